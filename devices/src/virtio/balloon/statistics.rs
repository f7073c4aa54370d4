//! The guest's memory statistics.

/// Bytes of one entry: a tag and a value (virtio 1.2, 5.5.6.3).
const ENTRY: usize = 10;
/// Most bytes of statistics that are read.
pub(super) const MOST: usize = 16 * ENTRY;

/// A guest's memory statistics (virtio 1.2, 5.5.6.4), as far as the guest reports them. The values are not checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O.
    pub major_faults: Option<u64>,
    /// Page faults that needed none.
    pub minor_faults: Option<u64>,
    /// Bytes that are not used.
    pub free_memory: Option<u64>,
    /// Bytes in all.
    pub total_memory: Option<u64>,
    /// Bytes that programs can allocate without swapping.
    pub available_memory: Option<u64>,
    /// Bytes of files that can be dropped.
    pub disk_caches: Option<u64>,
    /// Huge pages that were allocated.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be allocated.
    pub hugetlb_failures: Option<u64>,
}

impl Statistics {
    /// Parses a guest's buffer. Unknown tags are ignored.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut statistics = Self::default();
        let (entries, _) = bytes.as_chunks::<ENTRY>();
        for [tag_low, tag_high, value @ ..] in entries {
            let value = Some(u64::from_le_bytes(*value));
            match u16::from_le_bytes([*tag_low, *tag_high]) {
                0 => statistics.swap_in = value,
                1 => statistics.swap_out = value,
                2 => statistics.major_faults = value,
                3 => statistics.minor_faults = value,
                4 => statistics.free_memory = value,
                5 => statistics.total_memory = value,
                6 => statistics.available_memory = value,
                7 => statistics.disk_caches = value,
                8 => statistics.hugetlb_allocations = value,
                9 => statistics.hugetlb_failures = value,
                _ => {}
            }
        }
        statistics
    }
}
