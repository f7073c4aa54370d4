//! The configuration space of a disk (virtio 1.2, 5.2.4).

use super::backend::BlockBackend;
use super::request::{MOST_DISCARDED, MOST_ZEROED};
use crate::virtio::QUEUE_SIZE;

/// Data buffers in one request: a queue's worth without header and status byte.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of each of them, so that all together are no more than a request may have.
const SIZE_MAX: u32 = 64 << 10;
/// The configuration space (virtio 1.2, 5.2.4). What is not set here is not offered.
const CONFIG_LEN: usize = 60;
const CAPACITY: usize = 0;
const MAX_SIZE: usize = 8;
const MAX_SEGMENTS: usize = 12;
const BLOCK_SIZE: usize = 20;
/// The one byte that the guest may write: whether the cache is on.
pub(super) const WRITEBACK: usize = 32;
const MAX_DISCARD_SECTORS: usize = 36;
const MAX_DISCARD_SEGMENTS: usize = 40;
const DISCARD_ALIGNMENT: usize = 44;
const MAX_ZEROES_SECTORS: usize = 48;
const MAX_ZEROES_SEGMENTS: usize = 52;
const ZEROES_MAY_UNMAP: usize = 56;
/// Discarded ranges begin and end with pages of the host, or their space is not given up.
const HOST_PAGE_SECTORS: u32 = 8;

/// The configuration space of a disk.
pub(super) fn configuration(backend: &BlockBackend, writeback: bool) -> [u8; CONFIG_LEN] {
    let mut config = [0; CONFIG_LEN];
    config[CAPACITY..][..8].copy_from_slice(&backend.sectors().to_le_bytes());
    for (at, value) in [
        (MAX_SIZE, SIZE_MAX),
        (MAX_SEGMENTS, SEG_MAX),
        (BLOCK_SIZE, backend.block_size()),
        (MAX_DISCARD_SECTORS, MOST_DISCARDED),
        (MAX_DISCARD_SEGMENTS, 1),
        (DISCARD_ALIGNMENT, HOST_PAGE_SECTORS),
        (MAX_ZEROES_SECTORS, MOST_ZEROED),
        (MAX_ZEROES_SEGMENTS, 1),
        (ZEROES_MAY_UNMAP, 1),
    ] {
        config[at..][..4].copy_from_slice(&value.to_le_bytes());
    }
    config[WRITEBACK] = writeback.into();
    config
}
