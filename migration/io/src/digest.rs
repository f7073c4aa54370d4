//! Digests of guest memory: of blocks, so that several threads can share the work, and of all blocks together.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::memory::slice_of;
use crate::{GuestMemory, MemoryIoError, MemoryRange, PAGE_SIZE};

/// Bytes of a block. The last one of a region may be shorter.
const BLOCK: u64 = 2 << 20;
/// Bytes that are copied out and hashed at a time: fits the L2 cache with room to spare.
const CHUNK: u64 = 128 << 10;

/// The blocks of all regions, in order: 2 MiB each from a region's start on.
pub fn digest_blocks(memory: &GuestMemory) -> Vec<MemoryRange> {
    let of_region = |(start, len): (u64, u64)| {
        (0..len).step_by(BLOCK as usize).map(move |at| MemoryRange {
            gpa: start + at,
            len: BLOCK.min(len - at),
        })
    };
    let regions = memory.iter().map(|region| (region.start_addr().0, region.len()));
    regions.flat_map(of_region).collect()
}

/// xxh3-128 of a block, with zeroes in the pages for whose address `is_unused` says so, whatever they hold. Meaningful
/// only while nothing writes the memory. `buffer` is scratch space.
pub fn digest_block(
    memory: &GuestMemory,
    block: MemoryRange,
    is_unused: impl Fn(u64) -> bool,
    buffer: &mut Vec<u8>,
) -> Result<u128, MemoryIoError> {
    buffer.resize(CHUNK as usize, 0);
    let mut hash = Xxh3::new();
    for at in (0..block.len).step_by(CHUNK as usize) {
        // Hashing a copy costs little next to reading the memory, and needs no Rust reference to it.
        let range = MemoryRange {
            gpa: block.gpa + at,
            len: CHUNK.min(block.len - at),
        };
        let copied = slice_of(memory, range)?.copy_to(buffer.as_mut_slice());
        let pages = buffer[..copied].chunks_mut(PAGE_SIZE as usize);
        for (gpa, page) in (range.gpa..).step_by(PAGE_SIZE as usize).zip(pages) {
            if is_unused(gpa) {
                page.fill(0);
            }
        }
        hash.update(&buffer[..copied]);
    }
    Ok(hash.digest128())
}

/// The digest of all blocks: xxh3-128 of their digests in order, each as 16 bytes, little-endian.
pub fn digest_of_blocks(digests: &[u128]) -> u128 {
    let bytes: Vec<u8> = digests.iter().flat_map(|digest| digest.to_le_bytes()).collect();
    xxh3_128(&bytes)
}

/// The digest of all guest RAM, by this thread alone.
pub fn digest(memory: &GuestMemory) -> Result<u128, MemoryIoError> {
    let mut buffer = Vec::new();
    let digests: Result<Vec<u128>, _> = digest_blocks(memory)
        .into_iter()
        .map(|block| digest_block(memory, block, |_| false, &mut buffer))
        .collect();
    Ok(digest_of_blocks(&digests?))
}
