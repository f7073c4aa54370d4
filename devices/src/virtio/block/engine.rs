//! How requests are carried out: by io_uring, or by the disk's helper thread where io_uring cannot or might block. The
//! device thread waits for neither.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestAddress;

use super::backend::BlockBackend;
use super::error::BlockRequestError;
use super::execute::execute;
use super::io::BlockIo;
use super::parameters::IoEngine;
use crate::GuestMemory;
use crate::helper::{Helper, wait_readable};
use crate::virtio::sys::IoRing;
use crate::virtio::{Buffers, ChainHead, QUEUE_SIZE};

/// The work in flight, in bytes ([`BlockIo::work`]), from which on no other request starts. A drain waits for this work,
/// and for the last request.
const MAX_IN_FLIGHT: u64 = 16 << 20;

/// The engine of one disk: a ring if there is one, and a helper thread.
pub(super) struct BlockEngine {
    ring: Option<Box<IoRing<PendingIo>>>,
    helper: Helper<PendingIo, Result<(), BlockRequestError>>,
    /// The work in flight, in bytes ([`BlockIo::work`]).
    work: u64,
    /// Requests in flight, and flushes and write-outs of the device.
    count: usize,
    /// How many of the requests are write-outs of an image's metadata, which touch no guest memory.
    write_outs: usize,
}

/// The guest's request that is answered when some I/O is done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket {
    pub(super) head: ChainHead,
    pub(super) status: GuestAddress,
    /// The request's type.
    pub(super) kind: u32,
    /// Bytes that the request is about.
    pub(super) data: u64,
}

/// What some I/O was started for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    /// This request of the guest's.
    Guest(Ticket),
    /// A flush of the device's own, which makes all writes durable.
    Flush,
    /// A write-out of the device's own, which writes an image's metadata to its file.
    WriteOut,
}

/// I/O in flight.
#[derive(Debug)]
pub(super) struct PendingIo {
    origin: Origin,
    /// As [`BlockIo::work`] had it.
    work: u64,
    promises_durability: bool,
    completion: IoCompletion,
}

/// What the device thread must do when the I/O is done.
#[derive(Debug)]
enum IoCompletion {
    Read {
        len: u32,
    },
    Written {
        offset: u64,
        len: u64,
    },
    Flushed {
        generation: u64,
    },
    /// Nothing: the helper thread has done it.
    Nothing,
}

/// The outcome of some I/O, with the bytes that were written to the guest.
pub(super) type IoOutcome = (Origin, Result<u32, BlockRequestError>);

impl BlockEngine {
    /// An engine of the kind asked for; without io_uring on this host, one with the helper thread only.
    pub(super) fn new(wanted: IoEngine, backend: &BlockBackend) -> io::Result<Self> {
        let file = backend
            .raw_file()
            .filter(|file| wanted == IoEngine::Async && !blocks_in_submission(file));
        let ring = file.map(|file| IoRing::new(file, QUEUE_SIZE));
        let ring = ring.and_then(|ring| {
            let logged = ring.inspect_err(|error| {
                let disk = backend.path().display();
                tracing::info!(%disk, "no io_uring for this disk, its requests are served one by one: {error}");
            });
            logged.ok().map(Box::new)
        });
        Ok(Self {
            ring,
            helper: Helper::new("disk")?,
            work: 0,
            count: 0,
            write_outs: 0,
        })
    }

    /// Descriptors that become readable when some I/O is done.
    pub(super) fn events(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let ring = self.ring.iter().map(|ring| ring.as_fd());
        ring.chain([self.helper.as_fd()])
    }

    /// Whether another request may begin.
    pub(super) fn has_room(&self) -> bool {
        self.work < MAX_IN_FLIGHT && self.count < QUEUE_SIZE.into()
    }

    /// Whether something must still be submitted.
    pub(super) fn is_queued(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.is_queued())
    }

    /// Whether nothing is in flight.
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Starts a guest's request, for which there must be room. Its outcome comes from [`BlockEngine::next`]; if there
    /// is nothing to do, the bytes written are returned at once.
    pub(super) fn start(
        &mut self,
        memory: &GuestMemory,
        backend: &Arc<BlockBackend>,
        ticket: Ticket,
        io: BlockIo,
    ) -> Result<Option<u32>, BlockRequestError> {
        // The kernel reports a failed write-back only once, and an earlier flush has got that report.
        if io.promises_durability() && backend.take_flush_failure() {
            return Err(BlockRequestError::FlushFailed);
        }
        let is_needless = match io {
            BlockIo::Flush => backend.unflushed_generation().is_none(),
            BlockIo::WriteOut => !backend.needs_write_out(),
            _ => false,
        };
        if is_needless {
            return Ok(Some(0));
        }
        self.start_io(Some(memory), backend, Origin::Guest(ticket), io)?;
        Ok(None)
    }

    /// Starts a flush for the device; returns whether there was anything to flush.
    pub(super) fn start_flush(&mut self, backend: &Arc<BlockBackend>) -> Result<bool, BlockRequestError> {
        if backend.unflushed_generation().is_none() {
            return Ok(false);
        }
        self.start_io(None, backend, Origin::Flush, BlockIo::Flush)?;
        Ok(true)
    }

    /// Starts to write an image's metadata to its file; returns whether there were any to write.
    pub(super) fn start_write_out(&mut self, backend: &Arc<BlockBackend>) -> Result<bool, BlockRequestError> {
        if !backend.needs_write_out() {
            return Ok(false);
        }
        self.start_io(None, backend, Origin::WriteOut, BlockIo::WriteOut)?;
        Ok(true)
    }

    /// Hands the I/O to the ring if it can do it, and otherwise to the helper thread.
    fn start_io(
        &mut self,
        memory: Option<&GuestMemory>,
        backend: &Arc<BlockBackend>,
        origin: Origin,
        io: BlockIo,
    ) -> Result<(), BlockRequestError> {
        let (work, promises_durability) = (io.work(), io.promises_durability());
        let pending = |completion| PendingIo {
            origin,
            work,
            promises_durability,
            completion,
        };
        match (&mut self.ring, memory, io) {
            (Some(ring), Some(memory), BlockIo::Read { into, offset })
                if backend.can_transfer_directly(&into) =>
            {
                let completion = IoCompletion::Read { len: len(&into) };
                ring.read(pending(completion), memory, into, offset)?;
            }
            (
                Some(ring),
                Some(memory),
                BlockIo::Write {
                    from,
                    offset,
                    durability,
                },
            ) if backend.can_transfer_directly(&from) => {
                let len = from.len();
                let completion = IoCompletion::Written { offset, len };
                ring.write(pending(completion), memory, from, offset, durability)?;
            }
            (Some(ring), _, BlockIo::Flush) if ring.has_room() => {
                let generation = backend.unflushed_generation().unwrap_or_default();
                ring.flush(pending(IoCompletion::Flushed { generation }));
            }
            (_, memory, io) => {
                let completion = match &io {
                    BlockIo::Read { into, .. } => IoCompletion::Read { len: len(into) },
                    _ => IoCompletion::Nothing,
                };
                let (memory, backend) = (memory.cloned(), backend.clone());
                let failed = backend.clone();
                self.helper
                    .push(
                        pending(completion),
                        Box::new(move |cancelled| execute(memory.as_ref(), &backend, &io, cancelled)),
                    )
                    .map_err(failed.failed("start a thread for it"))?;
            }
        }
        self.work += work;
        self.count += 1;
        self.write_outs += usize::from(matches!(origin, Origin::WriteOut));
        Ok(())
    }

    /// Counts I/O as no longer in flight.
    fn remove(&mut self, pending: &PendingIo) {
        self.work -= pending.work;
        self.count -= 1;
        self.write_outs -= usize::from(matches!(pending.origin, Origin::WriteOut));
    }

    /// Submits what was started.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.ring.as_mut().map_or(Ok(()), |ring| ring.submit())
    }

    /// Waits until some I/O is done or `until` has come.
    pub(super) fn wait(&mut self, until: Instant) -> io::Result<()> {
        // A transfer that was done in part is queued again, and must be submitted to go on.
        self.submit()?;
        wait_readable(self.events(), until)
    }

    /// The next I/O that is done.
    pub(super) fn next(&mut self, backend: &BlockBackend) -> Option<IoOutcome> {
        let (pending, result) = self.next_finished(backend)?;
        let answers_promise = matches!(pending.origin, Origin::Guest(_)) && pending.promises_durability;
        // Another flush may have failed meanwhile, and have got the only report of the error.
        let flush_failed = answers_promise && backend.take_flush_failure();
        let result = match result {
            Ok(_) if flush_failed => Err(BlockRequestError::FlushFailed),
            result => result,
        };
        Some((pending.origin, result))
    }

    /// As [`BlockEngine::next`], for I/O that ends without an answer to the guest: a failed flush is kept for a later
    /// request.
    pub(super) fn next_unanswered(&mut self, backend: &BlockBackend) -> Option<IoOutcome> {
        let (pending, result) = self.next_finished(backend)?;
        Some((pending.origin, result))
    }

    /// The next I/O that is done, whether the guest gets an answer or not. The ring's comes before the helper's.
    fn next_finished(
        &mut self,
        backend: &BlockBackend,
    ) -> Option<(PendingIo, Result<u32, BlockRequestError>)> {
        let (pending, result) = match self.ring.as_mut().and_then(|ring| ring.next()) {
            Some((pending, result)) => {
                let result = finish_transfer(backend, &pending.completion, result);
                (pending, result)
            }
            None => {
                let (pending, result) = self.helper.next()?;
                (pending, result.unwrap_or(Err(BlockRequestError::Panicked)))
            }
        };
        self.remove(&pending);
        let written = match pending.completion {
            IoCompletion::Read { len } => len,
            _ => 0,
        };
        Some((pending, result.map(|()| written)))
    }

    /// Cancels everything in flight, except write-outs of an image's metadata. Returns whether it has ended: if not,
    /// the caller calls again.
    pub(super) fn cancel(&mut self, backend: &BlockBackend) -> bool {
        if self.is_empty() {
            return true;
        }
        for pending in self.helper.cancel() {
            self.remove(&pending);
        }
        if let Some(ring) = &mut self.ring {
            // Entries that could not be submitted before would stay in flight for ever.
            if let Err(error) = ring.submit() {
                tracing::debug!(%error, "transfers that end are not submitted");
            }
            ring.cancel();
        }
        while self.next_unanswered(backend).is_some() {}
        self.count == self.write_outs
    }
}

/// Whether io_uring might block in the submission of requests to this file, as was seen with FUSE on Linux 6.18.
fn blocks_in_submission(file: &File) -> bool {
    const FUSE_SUPER_MAGIC: rustix::fs::FsWord = 0x6573_5546;
    !rustix::fs::fstatfs(file).is_ok_and(|system| system.f_type != FUSE_SUPER_MAGIC)
}

/// Takes note of a transfer or flush that io_uring has done.
fn finish_transfer(
    backend: &BlockBackend,
    completion: &IoCompletion,
    result: io::Result<()>,
) -> Result<(), BlockRequestError> {
    let what = match *completion {
        IoCompletion::Read { .. } => "read it",
        IoCompletion::Written { offset, len } => {
            backend.modified(offset, len);
            "write to it"
        }
        IoCompletion::Flushed { generation } => {
            match &result {
                Ok(()) => backend.flushed(generation),
                Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => {}
                Err(_) => backend.record_flush_failure(),
            }
            "write it back"
        }
        IoCompletion::Nothing => "use it",
    };
    result.map_err(|error| backend.failed(what)(error).into())
}

/// Bytes of the buffers: a chain is at most 4 GiB long, and the status byte is part of it.
fn len(buffers: &Buffers) -> u32 {
    buffers.len() as u32
}
