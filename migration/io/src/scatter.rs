use std::os::fd::BorrowedFd;

use crate::memory::slice_of;
use crate::vectors::Vectors;
use crate::{GuestMemory, MemoryIoError, MemoryRange, Step};

/// Ranges of guest memory that are filled from a socket, in order and in place.
///
/// The memory's dirty bitmap is left alone: what arrives from the source is clean.
pub struct Scatter<'a> {
    vectors: Vectors<'a>,
}

impl<'a> Scatter<'a> {
    /// Prepares `ranges`; each must be within one region of `memory`.
    pub fn new(memory: &'a GuestMemory, ranges: &[MemoryRange]) -> Result<Self, MemoryIoError> {
        let mut vectors = Vectors::with_capacity(ranges.len());
        for range in ranges {
            vectors.push_guest(&slice_of(memory, *range)?);
        }
        Ok(Self { vectors })
    }

    /// Receives as much as the socket has now.
    pub fn step(&mut self, socket: BorrowedFd<'_>) -> Result<Step, MemoryIoError> {
        self.vectors.receive(socket)
    }
}
