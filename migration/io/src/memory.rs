//! Ranges of guest memory, and slices for them.

pub use guest_memory::{GuestMemory, PAGE_SIZE, zeroed_words};

use guest_memory::PageMarks;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::MemoryIoError;

/// A slice of one region of guest RAM.
pub(crate) type GuestSlice<'a> = VolatileSlice<'a, vm_memory::bitmap::RefSlice<'a, PageMarks>>;

/// A range of guest-physical memory within one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MemoryRange {
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
}

impl MemoryRange {
    /// Number of whole pages.
    pub fn pages(&self) -> u64 {
        self.len / PAGE_SIZE
    }
}

/// The memory behind a range, which must lie within one region.
pub(crate) fn slice_of(memory: &GuestMemory, range: MemoryRange) -> Result<GuestSlice<'_>, MemoryIoError> {
    let outside = |source| MemoryIoError::OutOfBounds {
        gpa: range.gpa,
        len: range.len,
        source,
    };
    let len = usize::try_from(range.len).unwrap_or(usize::MAX);
    memory.get_slice(GuestAddress(range.gpa), len).map_err(outside)
}
