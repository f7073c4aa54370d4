use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::MemoryIoError;

/// Guest RAM. The bitmap holds what the monitor's own devices wrote; what vCPUs write is KVM's to log.
pub type GuestMemory = vm_memory::GuestMemoryMmap<AtomicBitmap>;

/// A slice of one region of guest RAM.
pub(crate) type GuestSlice<'a> = VolatileSlice<'a, vm_memory::bitmap::RefSlice<'a, AtomicBitmap>>;

/// Bytes of a page: the unit of dirty logging and of migration.
pub const PAGE_SIZE: u64 = 4096;

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
