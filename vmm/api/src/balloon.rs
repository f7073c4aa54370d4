//! `PATCH /balloon` and `GET /balloon/statistics`, with Firecracker's fields.

use serde::{Deserialize, Serialize};

/// Body of `PATCH /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// How much of its memory the guest is to give up, in MiB.
    pub amount_mib: u64,
}

/// What is known of a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatistics {
    /// What the guest is to give up, in pages of 4 KiB.
    pub target_pages: u64,
    /// What it says that it has given up, in pages of 4 KiB.
    pub actual_pages: u64,
    /// The target in MiB.
    pub target_mib: u64,
    /// What it says that it has given up, in MiB.
    pub actual_mib: u64,
    /// Bytes that went back to the host so far, for the target or because the guest did not use them; those included
    /// that it took again.
    pub given_up_bytes: u64,
    /// What the guest says of its memory, as far as it does.
    #[serde(flatten)]
    pub guest: GuestMemoryStatistics,
}

/// A guest's memory statistics (virtio 1.2, 5.5.6.4), as far as it tells. Nothing here is checked: the guest can say
/// what it likes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemoryStatistics {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O.
    pub major_faults: Option<u64>,
    /// Page faults that needed none.
    pub minor_faults: Option<u64>,
    /// Bytes that nothing uses.
    pub free_memory: Option<u64>,
    /// Bytes in all.
    pub total_memory: Option<u64>,
    /// Bytes that programs can have without swapping.
    pub available_memory: Option<u64>,
    /// Bytes of files that can be dropped.
    pub disk_caches: Option<u64>,
    /// Huge pages that were had.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that were not to be had.
    pub hugetlb_failures: Option<u64>,
}
