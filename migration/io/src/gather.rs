//! Sends ranges of guest memory, and bytes of the monitor's own between them, without copying them together.

use std::os::fd::BorrowedFd;

use crate::memory::slice_of;
use crate::vectors::{Limit, Vectors};
use crate::{CallProgress, GuestMemory, MemoryIoError, MemoryRange};

/// One piece of what [`Gather`] sends.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// Bytes of the monitor's own, such as a header.
    Bytes(&'a [u8]),
    /// Guest memory.
    Guest(MemoryRange),
}

/// Headers and ranges of guest memory on their way to a socket, as few system calls as the socket allows.
///
/// The guest may write a range while it is sent: what arrives is then a mixture, and the page is dirty.
pub struct Gather<'a> {
    pub(crate) vectors: Vectors<'a>,
}

impl<'a> Gather<'a> {
    /// Prepares `pieces`; every range must be within one region of `memory`.
    pub fn new(
        memory: &'a GuestMemory,
        pieces: impl IntoIterator<Item = Piece<'a>>,
    ) -> Result<Self, MemoryIoError> {
        let pieces = pieces.into_iter();
        let mut vectors = Vectors::with_capacity(pieces.size_hint().0);
        for piece in pieces {
            match piece {
                Piece::Bytes(bytes) => vectors.push_bytes(bytes),
                Piece::Guest(range) => vectors.push_guest(&slice_of(memory, range)?),
            }
        }
        Ok(Self { vectors })
    }

    /// Sends as much as the socket takes now, and never raises SIGPIPE.
    pub fn step(&mut self, socket: BorrowedFd<'_>) -> Result<CallProgress, MemoryIoError> {
        self.vectors.send(socket, Limit::NONE, 0)
    }
}
