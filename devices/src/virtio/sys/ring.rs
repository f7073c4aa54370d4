//! Transfers between a file and guest memory that the kernel carries out while others go on (io_uring).

#![allow(
    unsafe_code,
    reason = "what is submitted to io_uring names memory by its address, and the kernel uses it later"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryError};

use crate::GuestMemory;
use crate::virtio::Buffers;

/// What may be in flight on one file, each with a tag of whoever asked for it.
pub(crate) struct Ring<T> {
    ring: IoUring,
    /// The file, by a descriptor of our own: it is open as long as anything names it.
    file: File,
    /// Where the transfers are from or to. Kept as long as the kernel may write there.
    memory: Option<GuestMemory>,
    slots: Vec<Option<Flight<T>>>,
    /// Slots that hold nothing.
    free: Vec<u16>,
    /// Entries that the kernel has not taken yet.
    queued: usize,
}

struct Flight<T> {
    tag: T,
    operation: Operation,
}

enum Operation {
    Read(Transfer),
    Write(Transfer, Durability),
    Flush,
}

/// When a write counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// When the host's cache has it.
    Cached,
    /// When it is on the disk.
    Durable,
}

struct Transfer {
    buffers: Buffers,
    vectors: Vec<Vector>,
    /// Vectors that are done.
    done: usize,
    /// Of what is left, in bytes from the file's beginning.
    offset: u64,
}

/// A part of guest memory, as the kernel wants to be told of it.
#[repr(transparent)]
struct Vector(libc::iovec);

// SAFETY: it is an address and a length. Nothing here follows it, and what it leads to, guest memory, belongs to no
// thread.
unsafe impl Send for Vector {}

impl<T> Ring<T> {
    /// Room for so many transfers of `file`, or why this host has no io_uring for us.
    pub(crate) fn new(file: &File, most: u16) -> io::Result<Self> {
        let ring = IoUring::new(most.into())?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Readv::CODE,
            opcode::Write::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
        ];
        // A kernel that is younger than the operations keeps completions that there is no room for, and needs lists
        // of buffers only until they are submitted.
        let able = needed.iter().all(|&code| probe.is_supported(code));
        if !able || !ring.params().is_feature_nodrop() || !ring.params().is_feature_submit_stable() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            ring,
            file: file.try_clone()?,
            memory: None,
            slots: (0..most).map(|_| None).collect(),
            free: (0..most).rev().collect(),
            queued: 0,
        })
    }

    /// Whether another transfer may begin.
    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether nothing is in flight.
    pub(crate) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Whether something waits for [`Ring::submit`].
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
        self.begin(tag, Operation::Read(transfer));
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
        self.begin(tag, Operation::Write(transfer, durability));
        Ok(())
    }

    /// Makes durable what was written when this is submitted.
    pub(crate) fn flush(&mut self, tag: T) {
        self.begin(tag, Operation::Flush);
    }

    /// Gives the kernel what is queued. What it cannot take now stays queued.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        if self.queued == 0 {
            return Ok(());
        }
        self.enter(0)
    }

    /// Waits until something that is in flight is done.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        if self.is_empty() || !self.ring.completion().is_empty() {
            return Ok(());
        }
        self.enter(1)
    }

    /// The next that is done. What is done in part goes on by itself, with the next [`Ring::submit`].
    pub(crate) fn next(&mut self) -> Option<(T, io::Result<()>)> {
        loop {
            let entry = self.ring.completion().next()?;
            let index = entry.user_data() as u16;
            let flight = self.slots.get_mut(usize::from(index))?.as_mut()?;
            match flight.operation.advance(entry.result()) {
                Step::Done(result) => {
                    let flight = self.slots[usize::from(index)].take()?;
                    self.free.push(index);
                    if let (Operation::Read(transfer), Some(memory)) = (&flight.operation, &self.memory) {
                        // All of it: after an error any part may have been written.
                        mark(memory, &transfer.buffers);
                    }
                    return Some((flight.tag, result));
                }
                Step::More => self.push(index, squeue::Flags::empty()),
                // A worker of the kernel's waits for whatever this is about.
                Step::Blocked => self.push(index, squeue::Flags::ASYNC),
            }
        }
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

    /// There must be room.
    fn begin(&mut self, tag: T, operation: Operation) {
        if let Some(index) = self.free.pop() {
            self.slots[usize::from(index)] = Some(Flight { tag, operation });
            self.push(index, squeue::Flags::empty());
        }
    }

    fn push(&mut self, index: u16, flags: squeue::Flags) {
        let Some(flight) = &self.slots[usize::from(index)] else {
            return;
        };
        let file = Fd(self.file.as_raw_fd());
        let entry = flight.operation.entry(file).flags(flags).user_data(index.into());
        // SAFETY: the descriptor is open as long as `self` lives. The addresses are of guest memory, which
        // `self.memory` keeps mapped until the kernel is done with them (see `drop`), and no Rust reference to it
        // exists. The list of vectors is the slot's until the transfer is done, and the kernel reads it at submission.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // The ring has an entry for each slot.
        debug_assert!(pushed.is_ok());
        self.queued += 1;
    }

    fn enter(&mut self, want: usize) -> io::Result<()> {
        loop {
            let entered = self.ring.submit_and_wait(want);
            self.queued = self.ring.submission().len();
            match entered {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // For want of memory, or of room for completions: what is done may free some.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    return Ok(());
                }
                // It stops at an entry that fails at once.
                Ok(taken) if taken > 0 && self.queued > 0 => {}
                done => return done.map(drop),
            }
        }
    }
}

impl<T> AsFd for Ring<T> {
    /// Readable when something is done.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the ring, which is borrowed for as long.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl<T> Drop for Ring<T> {
    /// Waits for the kernel, which may be writing to memory that ends soon.
    fn drop(&mut self) {
        while !self.is_empty() {
            if let Err(error) = self.wait() {
                tracing::error!(%error, "transfers in flight cannot be waited for: their memory is kept");
                std::mem::forget(self.memory.take());
                return;
            }
            while self.next().is_some() {}
        }
    }
}

/// How far an operation is.
enum Step {
    Done(io::Result<()>),
    /// A part of it is done.
    More,
    /// It would have to wait.
    Blocked,
}

impl Operation {
    fn entry(&self, file: Fd) -> squeue::Entry {
        match self {
            Self::Read(transfer) => match transfer.rest() {
                [Vector(one)] if one.iov_len <= MOST => {
                    opcode::Read::new(file, one.iov_base.cast(), one.iov_len as u32)
                        .offset(transfer.offset)
                        .build()
                }
                many => opcode::Readv::new(file, many.as_ptr().cast(), many.len() as u32)
                    .offset(transfer.offset)
                    .build(),
            },
            Self::Write(transfer, durability) => {
                let flags = match durability {
                    Durability::Cached => 0,
                    Durability::Durable => libc::RWF_DSYNC,
                };
                match transfer.rest() {
                    [Vector(one)] if one.iov_len <= MOST => {
                        opcode::Write::new(file, one.iov_base.cast_const().cast(), one.iov_len as u32)
                            .offset(transfer.offset)
                            .rw_flags(flags)
                            .build()
                    }
                    many => opcode::Writev::new(file, many.as_ptr().cast(), many.len() as u32)
                        .offset(transfer.offset)
                        .rw_flags(flags)
                        .build(),
                }
            }
            Self::Flush => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        }
    }

    /// What a completion says.
    fn advance(&mut self, result: i32) -> Step {
        let Ok(count) = usize::try_from(result) else {
            return match -result {
                libc::EINTR => Step::More,
                libc::EAGAIN => Step::Blocked,
                errno => Step::Done(Err(io::Error::from_raw_os_error(errno))),
            };
        };
        let (transfer, nothing) = match self {
            Self::Flush => return Step::Done(Ok(())),
            Self::Read(transfer) => (transfer, io::ErrorKind::UnexpectedEof),
            Self::Write(transfer, _) => (transfer, io::ErrorKind::WriteZero),
        };
        transfer.advance(count);
        match (transfer.rest().is_empty(), count) {
            (true, _) => Step::Done(Ok(())),
            (false, 0) => Step::Done(Err(nothing.into())),
            (false, _) => Step::More,
        }
    }
}

/// Most bytes that Linux moves in one call, less than a page's worth below 2 GiB.
const MOST: usize = 0x7fff_f000;

impl Transfer {
    fn rest(&self) -> &[Vector] {
        &self.vectors[self.done..]
    }

    fn advance(&mut self, mut count: usize) {
        self.offset = self.offset.saturating_add(count as u64);
        while let Some(Vector(first)) = self.vectors.get_mut(self.done) {
            if count < first.iov_len {
                first.iov_base = first.iov_base.wrapping_byte_add(count);
                first.iov_len -= count;
                return;
            }
            count -= first.iov_len;
            self.done += 1;
        }
    }
}

fn mark(memory: &GuestMemory, buffers: &Buffers) {
    for (address, len) in buffers.iter() {
        for slice in memory.get_slices(address, len as usize).flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}
