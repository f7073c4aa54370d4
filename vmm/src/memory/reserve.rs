//! Makes guest memory resident before a machine needs it.
#![allow(unsafe_code)] // Advice on mappings takes raw addresses.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use devices::GuestMemory;
use rustix::mm::Advice;
use threads::{Role, joined};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::MemoryError;

/// Bytes that one call populates: a multiple of every size of transparent huge pages.
const PIECE: u64 = 32 << 20;

/// Touches every page, so that no later access has to wait for the host's memory. Blocks until it is done.
pub fn make_resident(memory: &GuestMemory) -> Result<(), MemoryError> {
    let mut pieces = Vec::new();
    for region in memory.iter() {
        for start in (0..region.len()).step_by(PIECE as usize) {
            let len = PIECE.min(region.len() - start);
            pieces.push((region.as_ptr().wrapping_add(start as usize) as usize, len));
        }
    }
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((start, len)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            populate(*start, *len)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let helper = threads::spawn_scoped(scope, Role::Helper, "reserve", work);
        let helper = helper.map_err(MemoryError::Thread)?;
        let here = work();
        let failed = |failure| Err(MemoryError::Thread(io::Error::other(failure)));
        here.and(joined(helper.join()).unwrap_or_else(failed))
    })
}

fn populate(start: usize, len: u64) -> Result<(), MemoryError> {
    // SAFETY: the range lies in a mapping of guest memory that the caller borrows; populating pages does not
    // change what they hold.
    unsafe { rustix::mm::madvise(start as *mut _, len as usize, Advice::LinuxPopulateWrite) }.map_err(
        |source| MemoryError::Populate {
            len,
            source: source.into(),
        },
    )
}

#[cfg(test)]
mod tests {
    use migration::{MemoryKind, PageSet};

    use super::*;
    use crate::memory::{create, populated};

    #[test]
    fn every_page_is_there_afterwards() {
        for kind in [MemoryKind::Anonymous, MemoryKind::Shared] {
            let memory = create(&[(0, PIECE + 4096), (1 << 32, 8192)], kind).unwrap();
            let count = || {
                let mut pages = PageSet::of(&memory).unwrap();
                populated(&memory, &[], &mut pages).unwrap();
                pages.len()
            };
            assert_eq!(count(), 0, "{kind:?}");
            make_resident(&memory).unwrap();
            assert_eq!(count(), PIECE / 4096 + 3, "{kind:?}");
        }
    }
}
