//! Whether both sides have the same: digests of memory, by several threads, and of disks.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use migration_io::{GuestMemory, MemoryIoError, digest_block, digest_blocks, digest_of_blocks};
use threads::{Role, spawn_scoped};
use xxhash_rust::xxh3::Xxh3;

/// Bytes of a disk that are read and hashed at a time.
const CHUNK: u64 = 1 << 20;

/// A digest of guest RAM ([`digest_of_blocks`]), or, where disks come along, xxh3-128 of that (as 16 bytes,
/// little-endian) and of what is on the disks, in order. Of a disk: its size in bytes, and how to read it. Meaningful
/// only while nothing writes. Pages for whose address `is_unused` says so count as zero, whatever they hold. `threads`
/// threads share the memory's blocks, this one among them. `check` is called before each block; its error ends the work.
pub(crate) fn digest<E, R>(
    memory: &GuestMemory,
    threads: usize,
    is_unused: impl Fn(u64) -> bool + Sync,
    disks: impl IntoIterator<Item = (u64, R)>,
    check: impl Fn() -> Result<(), E> + Sync,
) -> Result<u128, E>
where
    E: From<MemoryIoError> + Send,
    R: FnMut(u64, &mut [u8]) -> Result<(), E>,
{
    let of_memory = digest_memory(memory, threads, is_unused, &check)?;
    let mut disks = disks.into_iter().peekable();
    if disks.peek().is_none() {
        return Ok(of_memory);
    }
    let mut hash = Xxh3::new();
    hash.update(&of_memory.to_le_bytes());
    let mut buffer = vec![0; CHUNK as usize];
    for (size, mut read) in disks {
        for at in (0..size).step_by(CHUNK as usize) {
            check()?;
            let piece = &mut buffer[..CHUNK.min(size - at) as usize];
            read(at, piece)?;
            hash.update(piece);
        }
    }
    Ok(hash.digest128())
}

fn digest_memory<E: From<MemoryIoError> + Send>(
    memory: &GuestMemory,
    threads: usize,
    is_unused: impl Fn(u64) -> bool + Sync,
    check: &(impl Fn() -> Result<(), E> + Sync),
) -> Result<u128, E> {
    let blocks = digest_blocks(memory);
    let next = AtomicUsize::new(0);
    let found = Mutex::new(FoundDigests {
        digests: vec![None; blocks.len()],
        failure: None,
    });
    let work = || {
        let mut buffer = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(block) = blocks.get(index) else { return };
            let digest = check().and_then(|()| Ok(digest_block(memory, *block, &is_unused, &mut buffer)?));
            if !found.lock().is_ok_and(|mut found| found.note(index, digest)) {
                return;
            }
        }
    };
    thread::scope(|scope| {
        for index in 1..threads.min(blocks.len()) {
            if let Err(error) = spawn_scoped(scope, Role::Helper, format!("digest {index}"), work) {
                // The others do its part.
                tracing::debug!(%error, "no thread for digests");
            }
        }
        work();
    });
    // A thread that panicked has left a block out.
    let FoundDigests { digests, failure } = found
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(failure) = failure {
        return Err(failure);
    }
    let digests: Option<Vec<u128>> = digests.into_iter().collect();
    digests
        .map(|digests| digest_of_blocks(&digests))
        .ok_or_else(|| MemoryIoError::DigestFailed.into())
}

/// What the threads have found.
struct FoundDigests<E> {
    digests: Vec<Option<u128>>,
    /// The first error, which ends all of them.
    failure: Option<E>,
}

impl<E> FoundDigests<E> {
    /// Takes in a block's digest. Whether the work goes on.
    fn note(&mut self, block: usize, digest: Result<u128, E>) -> bool {
        match digest {
            Ok(digest) => self.digests[block] = Some(digest),
            Err(error) => _ = self.failure.get_or_insert(error),
        }
        self.failure.is_none()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    type NoDisk = fn(u64, &mut [u8]) -> Result<(), MemoryIoError>;
    const NO_DISKS: [(u64, NoDisk); 0] = [];

    /// 37 blocks and a bit.
    fn memory() -> GuestMemory {
        let ranges = [
            (GuestAddress(0), 5 << 20),
            (GuestAddress(1 << 32), (68 << 20) + 4096),
        ];
        let memory = GuestMemory::from_ranges(&ranges).unwrap();
        for (gpa, byte) in [(3 << 20, 1u8), (1 << 32, 2), ((1 << 32) + (68 << 20), 3)] {
            memory.write_obj(byte, GuestAddress(gpa)).unwrap();
        }
        memory
    }

    #[test]
    fn any_number_of_threads_finds_the_same() {
        let memory = memory();
        let alone = migration_io::digest(&memory).unwrap();
        for threads in [1, 2, 7, 1000] {
            let shared = digest(
                &memory,
                threads,
                |_| false,
                NO_DISKS,
                || Ok::<_, MemoryIoError>(()),
            );
            assert_eq!(shared.unwrap(), alone, "{threads} threads");
        }
        memory
            .write_obj(4u8, GuestAddress((1 << 32) + (67 << 20)))
            .unwrap();
        let other = digest(&memory, 3, |_| false, NO_DISKS, || Ok::<_, MemoryIoError>(()));
        assert_ne!(other.unwrap(), alone);
    }

    #[test]
    fn an_error_of_the_caller_ends_all_threads() {
        let memory = memory();
        let asked = AtomicUsize::new(0);
        let check = || match asked.fetch_add(1, Ordering::Relaxed) {
            0..5 => Ok(()),
            _ => Err(MemoryIoError::Closed),
        };
        let ended = digest(&memory, 3, |_| false, NO_DISKS, check);
        assert!(matches!(ended, Err(MemoryIoError::Closed)), "{ended:?}");
        let asked = asked.into_inner();
        assert!(asked <= 5 + 3, "asked {asked} times");
    }

    #[test]
    fn a_thread_that_panics_is_an_error_and_not_a_digest() {
        let memory = memory();
        let me = thread::current().id();
        let is_unused = |gpa| {
            assert!(gpa != 1 << 32 || thread::current().id() == me, "planted");
            false
        };
        // Whichever thread takes the planted block: this one finds it whole, another panics.
        let found = digest(&memory, 2, is_unused, NO_DISKS, || {
            if thread::current().id() == me {
                thread::sleep(std::time::Duration::from_millis(20));
            }
            Ok::<_, MemoryIoError>(())
        });
        assert!(matches!(found, Err(MemoryIoError::DigestFailed)), "{found:?}");
    }
}
