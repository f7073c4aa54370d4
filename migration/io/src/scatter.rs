//! Receives bytes from a socket straight into ranges of guest memory.

use std::os::fd::BorrowedFd;

use crate::memory::slice_of;
use crate::vectors::Vectors;
use crate::{CallProgress, GuestMemory, MemoryIoError, MemoryRange};

/// Ranges of guest memory that are filled from a socket, in order and in place.
///
/// The memory's dirty bitmap is left alone: what arrives from the source is clean.
pub struct Scatter<'a> {
    vectors: Vectors<'a>,
    bytes: u64,
}

impl<'a> Scatter<'a> {
    /// Prepares `ranges`; each must be within one region of `memory`.
    pub fn new(memory: &'a GuestMemory, ranges: &[MemoryRange]) -> Result<Self, MemoryIoError> {
        let mut vectors = Vectors::with_capacity(ranges.len());
        for range in ranges {
            vectors.push_guest(&slice_of(memory, *range)?);
        }
        let bytes = ranges
            .iter()
            .fold(0, |sum: u64, range| sum.saturating_add(range.len));
        Ok(Self { vectors, bytes })
    }

    /// Receives as much as the socket has now.
    pub fn step(&mut self, socket: BorrowedFd<'_>) -> Result<CallProgress, MemoryIoError> {
        self.vectors.receive(socket)
    }

    /// Bytes that are still to come.
    pub fn left(&self) -> u64 {
        self.bytes.saturating_sub(self.vectors.moved())
    }
}
