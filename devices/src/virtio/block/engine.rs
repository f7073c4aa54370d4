//! How transfers are carried out: by io_uring while others go on, or one after the other where there is none.

use std::os::fd::{AsFd, BorrowedFd};

use vm_memory::GuestAddress;

use super::backend::Backend;
use super::request::RequestError;
use crate::GuestMemory;
use crate::virtio::sys::{Durability, Ring};
use crate::virtio::{Buffers, Head, QUEUE_SIZE};

/// Which of them a disk is to have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoEngine {
    /// io_uring, if the host lets us have it.
    #[default]
    Async,
    /// System calls on the device thread.
    Sync,
}

/// One of them at work.
pub(super) enum Engine {
    Sync,
    Ring(Box<Ring<Flight>>),
}

/// What a request asks of the disk.
#[derive(Debug)]
pub(super) enum Io {
    Read {
        into: Buffers,
        /// In bytes.
        offset: u64,
    },
    Write {
        from: Buffers,
        offset: u64,
        durability: Durability,
    },
    Flush,
}

impl Io {
    fn buffers(&self) -> Option<&Buffers> {
        match self {
            Self::Read { into: buffers, .. } | Self::Write { from: buffers, .. } => Some(buffers),
            Self::Flush => None,
        }
    }
}

/// The request that is answered when something is done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket {
    pub(super) head: Head,
    pub(super) status: GuestAddress,
    /// What it is about, and how many bytes it has.
    pub(super) kind: u32,
    pub(super) data: u64,
}

/// Something in flight.
#[derive(Debug)]
pub(super) struct Flight {
    ticket: Ticket,
    then: Then,
}

/// What is to be seen to when it is done.
#[derive(Debug)]
enum Then {
    Read { len: u32 },
    Written { offset: u64, len: u64 },
    Flushed { generation: u64 },
}

impl Engine {
    /// The engine that was asked for, if this host has it.
    pub(super) fn new(wanted: IoEngine, backend: &Backend) -> Self {
        let file = match backend.raw() {
            Some(file) if wanted == IoEngine::Async => file,
            _ => return Self::Sync,
        };
        match Ring::new(file, QUEUE_SIZE) {
            Ok(ring) => Self::Ring(Box::new(ring)),
            Err(error) => {
                let disk = backend.path().display();
                tracing::info!(%disk, "no io_uring for this disk, its requests are served one by one: {error}");
                Self::Sync
            }
        }
    }

    /// Becomes readable when something is done.
    pub(super) fn event(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Sync => None,
            Self::Ring(ring) => Some(ring.as_fd()),
        }
    }

    /// Whether another request may begin.
    pub(super) fn has_room(&self) -> bool {
        match self {
            Self::Sync => true,
            Self::Ring(ring) => ring.has_room(),
        }
    }

    /// Whether something is to be submitted yet.
    pub(super) fn is_queued(&self) -> bool {
        match self {
            Self::Sync => false,
            Self::Ring(ring) => ring.is_queued(),
        }
    }

    /// Whether nothing is in flight.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Sync => true,
            Self::Ring(ring) => ring.is_empty(),
        }
    }

    /// Begins, or does at once: then it returns how many bytes were written to the guest. There must be room.
    pub(super) fn start(
        &mut self,
        memory: &GuestMemory,
        backend: &Backend,
        ticket: Ticket,
        io: Io,
    ) -> Result<Option<u32>, RequestError> {
        match self {
            Self::Ring(ring) if io.buffers().is_none_or(|buffers| backend.takes(buffers)) => {
                start(ring, memory, backend, ticket, io)
            }
            _ => carry_out(memory, backend, &io).map(Some),
        }
    }

    /// Hands over what was begun.
    pub(super) fn submit(&mut self) -> std::io::Result<()> {
        match self {
            Self::Sync => Ok(()),
            Self::Ring(ring) => ring.submit(),
        }
    }

    /// Waits until something is done, if there is anything in flight.
    pub(super) fn wait(&mut self) -> std::io::Result<()> {
        match self {
            Self::Sync => Ok(()),
            Self::Ring(ring) => ring.wait(),
        }
    }

    /// The next that is done, and how many bytes were written to the guest.
    pub(super) fn next(&mut self, backend: &Backend) -> Option<(Ticket, Result<u32, RequestError>)> {
        let Self::Ring(ring) = self else { return None };
        let (Flight { ticket, then }, result) = ring.next()?;
        let (what, written) = match then {
            Then::Read { len } => ("read it", len),
            Then::Written { offset, len } => {
                backend.modified(offset, len);
                ("write to it", 0)
            }
            Then::Flushed { generation } => {
                if result.is_ok() {
                    backend.flushed(generation);
                }
                ("write it back", 0)
            }
        };
        let done = result.map(|()| written);
        Some((ticket, done.map_err(|error| backend.failed(what)(error).into())))
    }

    /// Waits for what is in flight and forgets what came of it.
    pub(super) fn abandon(&mut self, backend: &Backend) {
        while !self.is_empty() {
            if let Err(error) = self.wait() {
                tracing::error!(%error, "io_uring fails: requests are served one by one");
                // Sees to it that the memory stays.
                *self = Self::Sync;
            }
            while self.next(backend).is_some() {}
        }
    }
}

fn carry_out(memory: &GuestMemory, backend: &Backend, io: &Io) -> Result<u32, RequestError> {
    match io {
        Io::Read { into, offset } => {
            backend.read(memory, into, *offset)?;
            Ok(len(into))
        }
        Io::Write {
            from,
            offset,
            durability,
        } => {
            backend.write(memory, from, *offset, *durability)?;
            Ok(0)
        }
        Io::Flush => {
            backend.flush()?;
            Ok(0)
        }
    }
}

fn start(
    ring: &mut Ring<Flight>,
    memory: &GuestMemory,
    backend: &Backend,
    ticket: Ticket,
    io: Io,
) -> Result<Option<u32>, RequestError> {
    let flight = |then| Flight { ticket, then };
    match io {
        Io::Read { into, offset } => {
            let then = Then::Read { len: len(&into) };
            ring.read(flight(then), memory, into, offset)?;
        }
        Io::Write {
            from,
            offset,
            durability,
        } => {
            let len = from.len();
            let then = Then::Written { offset, len };
            ring.write(flight(then), memory, from, offset, durability)?;
        }
        Io::Flush => match backend.unflushed() {
            Some(generation) => ring.flush(flight(Then::Flushed { generation })),
            None => return Ok(Some(0)),
        },
    }
    Ok(None)
}

/// A chain is at most 4 GiB long, and the status byte is part of it.
fn len(buffers: &Buffers) -> u32 {
    buffers.len() as u32
}
