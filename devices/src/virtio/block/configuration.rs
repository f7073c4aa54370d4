//! The configuration space of a disk (virtio 1.2, 5.2.4).

use super::backend::BlockBackend;
use super::request::{MAX_DISCARDED, MAX_ZEROED};
use crate::virtio::QUEUE_SIZE;

/// The most data buffers in one request: a queue's worth without header and status byte.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// The most bytes of each data buffer, so that all together are no more than a request may have.
const SIZE_MAX: u32 = 64 << 10;
/// Discarded ranges begin and end with pages of the host, or their space is not given up.
const HOST_PAGE_SECTORS: u32 = 8;

/// Bytes of the configuration space. Fields that are not set here are not offered.
const CONFIG_LEN: usize = 60;
// Offsets of the fields, by the names that virtio gives them.
const CAPACITY_AT: usize = 0;
const SIZE_MAX_AT: usize = 8;
const SEG_MAX_AT: usize = 12;
const BLK_SIZE_AT: usize = 20;
/// The offset of the one byte that the guest may write: whether the cache is on.
pub(super) const WRITEBACK_AT: usize = 32;
const MAX_DISCARD_SECTORS_AT: usize = 36;
const MAX_DISCARD_SEG_AT: usize = 40;
const DISCARD_SECTOR_ALIGNMENT_AT: usize = 44;
const MAX_WRITE_ZEROES_SECTORS_AT: usize = 48;
const MAX_WRITE_ZEROES_SEG_AT: usize = 52;
const WRITE_ZEROES_MAY_UNMAP_AT: usize = 56;

/// The configuration space of a disk.
pub(super) fn configuration(backend: &BlockBackend, writeback: bool) -> [u8; CONFIG_LEN] {
    let mut config = [0; CONFIG_LEN];
    config[CAPACITY_AT..][..8].copy_from_slice(&backend.sectors().to_le_bytes());
    for (at, value) in [
        (SIZE_MAX_AT, SIZE_MAX),
        (SEG_MAX_AT, SEG_MAX),
        (BLK_SIZE_AT, backend.block_size()),
        (MAX_DISCARD_SECTORS_AT, MAX_DISCARDED),
        (MAX_DISCARD_SEG_AT, 1),
        (DISCARD_SECTOR_ALIGNMENT_AT, HOST_PAGE_SECTORS),
        (MAX_WRITE_ZEROES_SECTORS_AT, MAX_ZEROED),
        (MAX_WRITE_ZEROES_SEG_AT, 1),
        (WRITE_ZEROES_MAY_UNMAP_AT, 1),
    ] {
        config[at..][..4].copy_from_slice(&value.to_le_bytes());
    }
    config[WRITEBACK_AT] = writeback.into();
    config
}
