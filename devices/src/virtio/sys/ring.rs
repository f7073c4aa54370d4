//! Transfers between a file and guest memory that the kernel carries out in the background (io_uring).

#![allow(
    unsafe_code,
    reason = "what is submitted to io_uring names memory by its address, and the kernel uses it later"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::types::CancelBuilder;
use io_uring::{IoUring, Probe, opcode, squeue};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryError};

use super::transfer::{Durability, RingOperation, RingStep, Transfer, Vector};
use crate::GuestMemory;
use crate::helper::wait_readable;
use crate::virtio::Buffers;

/// Transfers in flight on one file, each with a tag by which the caller knows it.
pub(crate) struct IoRing<T> {
    ring: IoUring,
    /// The memory of the transfers. Kept as long as the kernel may write to it.
    memory: Option<GuestMemory>,
    slots: Vec<Option<RingSlot<T>>>,
    /// Slots that hold nothing.
    free: Vec<u16>,
    /// Entries that the kernel has not taken yet.
    queued: usize,
    /// Whether everything in flight was cancelled.
    cancelled: bool,
    /// Transfers for which there was no room in the ring itself.
    refused: Vec<(T, io::Error)>,
}

struct RingSlot<T> {
    tag: T,
    operation: RingOperation,
}

impl<T> IoRing<T> {
    /// Makes a ring for at most `most` transfers of `file`; fails if this host does not let the process use io_uring.
    /// The kernel refuses all operations but those used here, and all other files.
    pub(crate) fn new(file: &File, most: u16) -> io::Result<Self> {
        let (ring, restricted) = match IoUring::builder().setup_r_disabled().build(most.into()) {
            Ok(ring) => {
                restrict(&ring)?;
                (ring, true)
            }
            // Older than 5.10.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (IoUring::new(most.into())?, false),
            Err(error) => return Err(error),
        };
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        // A kernel that has these operations also keeps completions for which there is no room, and reads the lists of
        // buffers at submission only; the check makes sure.
        let able = TRANSFERS.iter().all(|&code| probe.is_supported(code));
        if !able || !ring.params().is_feature_nodrop() || !ring.params().is_feature_submit_stable() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // The kernel keeps the file open as long as the ring.
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        if restricted {
            ring.submitter().register_enable_rings()?;
        }
        Ok(Self {
            ring,
            memory: None,
            slots: (0..most).map(|_| None).collect(),
            free: (0..most).rev().collect(),
            queued: 0,
            cancelled: false,
            refused: Vec::new(),
        })
    }

    /// Whether another transfer may begin.
    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether nothing is in flight.
    pub(crate) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len() && self.refused.is_empty()
    }

    /// Whether something waits for [`IoRing::submit`].
    pub(crate) fn is_queued(&self) -> bool {
        self.queued > 0
    }

    /// Reads from byte `offset` of the file into `buffers`, whose pages are marked when that is done.
    pub(crate) fn read(
        &mut self,
        tag: T,
        memory: &GuestMemory,
        buffers: Buffers,
        offset: u64,
    ) -> Result<(), GuestMemoryError> {
        let transfer = self.transfer(memory, buffers, offset)?;
        self.begin(tag, RingOperation::Read(transfer));
        Ok(())
    }

    /// Writes what `buffers` hold at byte `offset` of the file.
    pub(crate) fn write(
        &mut self,
        tag: T,
        memory: &GuestMemory,
        buffers: Buffers,
        offset: u64,
        durability: Durability,
    ) -> Result<(), GuestMemoryError> {
        let transfer = self.transfer(memory, buffers, offset)?;
        self.begin(tag, RingOperation::Write(transfer, durability));
        Ok(())
    }

    /// Makes durable what was written when this is submitted.
    pub(crate) fn flush(&mut self, tag: T) {
        self.begin(tag, RingOperation::Flush);
    }

    /// Submits the queued entries. Those that the kernel cannot take now stay queued.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        if self.queued == 0 {
            return Ok(());
        }
        self.enter()
    }

    /// Cancels everything in flight: a transfer that the kernel has not begun does not begin, and one that is done in
    /// part ends there. Nothing else may begin until [`IoRing::is_empty`].
    pub(crate) fn cancel(&mut self) {
        if self.cancelled || self.is_empty() {
            return;
        }
        self.cancelled = true;
        if let Err(error) = self.submit() {
            tracing::debug!(%error, "nothing more is submitted");
        }
        let entry = opcode::AsyncCancel2::new(CancelBuilder::any().all()).build();
        let entry = entry.flags(squeue::Flags::FIXED_FILE).user_data(CANCEL);
        // SAFETY: the entry has no address.
        if unsafe { self.ring.submission().push(&entry) }.is_ok() {
            self.queued += 1;
            // Kernels before 5.19 do not know this operation: there the transfers in flight run to their end.
            if let Err(error) = self.submit() {
                tracing::debug!(%error, "transfers in flight are not cancelled");
            }
        }
    }

    /// The next transfer that is done. One that is done in part is queued again for the next [`IoRing::submit`].
    pub(crate) fn next(&mut self) -> Option<(T, io::Result<()>)> {
        loop {
            if let Some((tag, error)) = self.refused.pop() {
                return Some((tag, Err(error)));
            }
            let Some(entry) = self.ring.completion().next() else {
                self.cancelled &= !self.is_empty();
                return None;
            };
            let Ok(index) = u16::try_from(entry.user_data()) else {
                continue;
            };
            let flight = self.slots.get_mut(usize::from(index))?.as_mut()?;
            let step = match flight.operation.advance(entry.result()) {
                RingStep::More | RingStep::Blocked if self.cancelled => {
                    RingStep::Done(Err(io::Error::from_raw_os_error(libc::ECANCELED)))
                }
                step => step,
            };
            match step {
                RingStep::Done(result) => return self.end(index).map(|tag| (tag, result)),
                RingStep::More => self.push(index, squeue::Flags::empty()),
                // A worker thread of the kernel waits for it.
                RingStep::Blocked => self.push(index, squeue::Flags::ASYNC),
            }
        }
    }

    /// Frees a slot with which the kernel is done.
    fn end(&mut self, index: u16) -> Option<T> {
        let flight = self.slots.get_mut(usize::from(index))?.take()?;
        self.free.push(index);
        if let (RingOperation::Read(transfer), Some(memory)) = (&flight.operation, &self.memory) {
            // All of it: after an error any part may have been written.
            mark(memory, &transfer.buffers);
        }
        Some(flight.tag)
    }

    fn transfer(
        &mut self,
        memory: &GuestMemory,
        buffers: Buffers,
        offset: u64,
    ) -> Result<Transfer, GuestMemoryError> {
        let memory = self.memory.get_or_insert_with(|| memory.clone());
        let mut vectors = Vec::with_capacity(buffers.count());
        for (address, len) in buffers.iter() {
            for slice in memory.get_slices(address, len as usize) {
                let slice = slice?;
                vectors.push(Vector(libc::iovec {
                    // The guard that ends here does nothing: this memory is mapped for good, and not page by page as
                    // Xen's is.
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                }));
            }
        }
        Ok(Transfer {
            buffers,
            vectors,
            done: 0,
            offset,
        })
    }

    /// Puts an operation into a free slot, of which there must be one.
    fn begin(&mut self, tag: T, operation: RingOperation) {
        if let Some(index) = self.free.pop() {
            self.slots[usize::from(index)] = Some(RingSlot { tag, operation });
            self.push(index, squeue::Flags::empty());
        }
    }

    fn push(&mut self, index: u16, flags: squeue::Flags) {
        let Some(slot) = &self.slots[usize::from(index)] else {
            return;
        };
        let entry = slot.operation.entry().flags(flags).user_data(index.into());
        // SAFETY: the addresses are of guest memory, which `self.memory` keeps mapped until the kernel is done with them
        // (see `drop`), and no Rust reference to it exists. The list of vectors is the slot's until the transfer is done,
        // and the kernel reads it at submission.
        if unsafe { self.ring.submission().push(&entry) }.is_ok() {
            self.queued += 1;
        } else if let Some(tag) = self.end(index) {
            // The ring has an entry for each slot, but a cancellation may have taken one.
            self.refused.push((tag, io::ErrorKind::ResourceBusy.into()));
        }
    }

    /// Waits until a transfer is done or `until` has come.
    fn wait(&mut self, until: Instant) -> io::Result<()> {
        self.submit()?;
        wait_readable([self.as_fd()], until)
    }

    fn enter(&mut self) -> io::Result<()> {
        loop {
            let entered = self.ring.submit();
            self.queued = self.ring.submission().len();
            match entered {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is out of memory or of room for completions, which transfers that end free again.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    return Ok(());
                }
                // The kernel stops at an entry that fails at once; the rest is submitted again.
                Ok(taken) if taken > 0 && self.queued > 0 => {}
                done => return done.map(drop),
            }
        }
    }
}

impl<T> AsFd for IoRing<T> {
    /// Readable when a transfer is done.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the ring, which is borrowed for as long.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl<T> Drop for IoRing<T> {
    /// Waits until the kernel no longer writes to guest memory. If that takes too long the memory is leaked.
    fn drop(&mut self) {
        let until = Instant::now() + END_TIME;
        self.cancel();
        loop {
            while self.next().is_some() {}
            if self.is_empty() {
                return;
            }
            let waited = self.wait(until);
            if waited.is_err() || Instant::now() >= until {
                tracing::error!(?waited, "transfers in flight do not end: their memory is kept");
                std::mem::forget(self.memory.take());
                return;
            }
        }
    }
}

/// How long the end of a ring waits for transfers in flight.
const END_TIME: Duration = Duration::from_secs(2);

/// The operations of transfers.
const TRANSFERS: [u8; 5] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
];

/// The user data of a cancellation, whose completion is no transfer's.
const CANCEL: u64 = u64::MAX;

/// Restricts the ring, once it is enabled, to the operations used here, on registered files only.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let flags = squeue::Flags::FIXED_FILE | squeue::Flags::ASYNC;
    let mut all: Vec<_> = TRANSFERS
        .into_iter()
        .chain([opcode::AsyncCancel2::CODE])
        .map(Restriction::sqe_op)
        .collect();
    all.push(Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()));
    all.push(Restriction::sqe_flags_allowed(flags.bits()));
    ring.submitter().register_restrictions(&mut all)
}

fn mark(memory: &GuestMemory, buffers: &Buffers) {
    for (address, len) in buffers.iter() {
        for slice in memory.get_slices(address, len as usize).flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use io_uring::types::Fd;

    use super::super::transfer::FILE;
    use super::*;

    #[test]
    fn nothing_else_can_be_asked_of_the_kernel() {
        let file = tempfile::tempfile().unwrap();
        let mut ring = IoRing::<()>::new(&file, 4).unwrap();
        let mut byte = 0u8;
        let fd = Fd(file.as_raw_fd());
        let refused = [
            opcode::Nop::new().build().flags(squeue::Flags::FIXED_FILE),
            opcode::Close::new(fd).build(),
            opcode::Read::new(fd, &raw mut byte, 1).build(),
            opcode::Fsync::new(FILE).build().flags(squeue::Flags::IO_LINK),
        ];
        for entry in refused {
            // SAFETY: none of them is carried out, and the byte outlives them all.
            unsafe { ring.ring.submission().push(&entry) }.unwrap();
            ring.ring.submit_and_wait(1).unwrap();
            let result = ring.ring.completion().next().unwrap().result();
            assert_eq!(result, -libc::EACCES, "{entry:?}");
        }
        // SAFETY: it has no address.
        unsafe { ring.ring.submission().push(&opcode::Fsync::new(FILE).build()) }.unwrap();
        ring.ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.ring.completion().next().unwrap().result(), 0);
    }
}
