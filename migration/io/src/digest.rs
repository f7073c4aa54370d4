use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use xxhash_rust::xxh3::Xxh3;

use crate::memory::slice_of;
use crate::{GuestMemory, MemoryIoError, MemoryRange, PAGE_SIZE};

/// Bytes that are copied out and hashed at a time: fits the L2 cache with room to spare.
const CHUNK: u64 = 128 << 10;

/// xxh3-128 of all guest RAM, region after region. Meaningful only while nothing writes the memory.
pub fn digest(memory: &GuestMemory) -> Result<u128, MemoryIoError> {
    digest_without(memory, |_| false, || Ok(()))
}

/// The same with zeroes in the pages for whose address `is_unused` says so, whatever they hold. `go_on` is asked every
/// now and then; its error ends it.
pub fn digest_without<E: From<MemoryIoError>>(
    memory: &GuestMemory,
    is_unused: impl Fn(u64) -> bool,
    mut go_on: impl FnMut() -> Result<(), E>,
) -> Result<u128, E> {
    let mut hash = Xxh3::new();
    let mut buffer = vec![0; CHUNK as usize];
    for region in memory.iter() {
        let (start, len) = (region.start_addr().0, region.len());
        for at in (0..len).step_by(CHUNK as usize) {
            go_on()?;
            // Hashing a copy costs little next to reading the memory, and needs no Rust reference to it.
            let range = MemoryRange {
                gpa: start + at,
                len: CHUNK.min(len - at),
            };
            let copied = slice_of(memory, range)?.copy_to(&mut buffer);
            let pages = buffer[..copied].chunks_mut(PAGE_SIZE as usize);
            for (gpa, page) in (range.gpa..).step_by(PAGE_SIZE as usize).zip(pages) {
                if is_unused(gpa) {
                    page.fill(0);
                }
            }
            hash.update(&buffer[..copied]);
        }
    }
    Ok(hash.digest128())
}
