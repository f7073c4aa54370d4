//! Whether both sides have the same.

use migration_io::{GuestMemory, MemoryIoError};
use xxhash_rust::xxh3::Xxh3;

/// Bytes of a disk that are read and hashed at a time.
const CHUNK: u64 = 1 << 20;

/// A digest of guest RAM (xxh3-128 of all regions in order), or, where disks come along, xxh3-128 of that (as 16 bytes,
/// little-endian) and of what is on the disks, in order. Of a disk: its size in bytes, and how to read it. Meaningful
/// only while nobody writes. Pages for whose address `is_unused` says so count as zero, whatever they hold.
/// `go_on` is asked every now and then; its error ends it.
pub(crate) fn digest<E, R>(
    memory: &GuestMemory,
    is_unused: impl Fn(u64) -> bool,
    disks: impl IntoIterator<Item = (u64, R)>,
    mut go_on: impl FnMut() -> Result<(), E>,
) -> Result<u128, E>
where
    E: From<MemoryIoError>,
    R: FnMut(u64, &mut [u8]) -> Result<(), E>,
{
    let of_memory = migration_io::digest_without(memory, is_unused, &mut go_on)?;
    let mut disks = disks.into_iter().peekable();
    if disks.peek().is_none() {
        return Ok(of_memory);
    }
    let mut hash = Xxh3::new();
    hash.update(&of_memory.to_le_bytes());
    let mut buffer = vec![0; CHUNK as usize];
    for (size, mut read) in disks {
        for at in (0..size).step_by(CHUNK as usize) {
            go_on()?;
            let piece = &mut buffer[..CHUNK.min(size - at) as usize];
            read(at, piece)?;
            hash.update(piece);
        }
    }
    Ok(hash.digest128())
}
