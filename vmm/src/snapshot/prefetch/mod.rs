//! Brings a snapshot's memory while the guest runs already: first what it waits for, then everything else.
//!
//! ```text
//!  the guest ── touches a missing page ──▶ userfaultfd ──▶ placer ── demands its block ──▶ readers (2)
//!      ▲                                                     ▲                               │ read it, or the next one,
//!      └────────── its pages are there ◀── fills them ───────┴──── blocks, in buffers ◀──────┘ check it
//! ```
//!
//! A page is there, or whoever touches it waits: until all are there the userfaultfd stays open, whatever becomes of the
//! threads. A block gets to the guest only if it has its checksum.

mod placer;
mod reader;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use api::SnapshotProgress;
use devices::GuestMemory;
use migration::PageSet;
use threads::{Role, Thread};

use super::SnapshotError;
use super::blocks::{BLOCK, open_again};
use crate::memory::Userfault;
use placer::{PlacedBlocks, Placer, PlacingEnd, is_placed};
use reader::BlockSource;

/// Threads that read: one that waits for the disk, and one that computes checksums meanwhile.
const READERS: usize = 2;

/// The threads that bring a machine's memory, until all of it is there.
#[derive(Debug)]
pub struct Prefetch {
    shared: Arc<PrefetchShared>,
    threads: Vec<Thread>,
}

/// What the threads share with whoever asks how far they are.
#[derive(Debug)]
struct PrefetchShared {
    source: BlockSource,
    placed: Arc<PlacedBlocks>,
    /// Kept here, so that it outlives a thread that panics: once it is closed, missing pages are zero. Gone when all are
    /// there. The placer holds the lock as long as it runs.
    userfault: Mutex<Option<Userfault>>,
    complete: AtomicBool,
}

impl Prefetch {
    /// Begins to fill `memory`, none of which may be there yet, from that file. `on_failed` is called once, on a thread of
    /// its own, with the reason if a block cannot be read or is damaged: who needs a page of it waits for ever.
    pub(super) fn start(
        memory: &GuestMemory,
        file: File,
        path: PathBuf,
        checksums: Vec<u64>,
        on_failed: impl FnOnce(String) + Send + 'static,
    ) -> Result<Self, SnapshotError> {
        let userfault = Userfault::register(memory)?;
        let source = BlockSource::new(memory, path.clone(), checksums)?;
        let words = source.blocks.len().div_ceil(64);
        let shared = Arc::new(PrefetchShared {
            source,
            placed: Arc::new((0..words).map(|_| AtomicU64::new(0)).collect()),
            userfault: Mutex::new(Some(userfault)),
            complete: AtomicBool::new(false),
        });
        // Made before the threads, so that those that were started end if one cannot be.
        let mut prefetch = Self {
            shared,
            threads: Vec::new(),
        };
        for number in 0..READERS {
            let shared = prefetch.shared.clone();
            let file = open_again(&file, OpenOptions::new().read(true), &path)?;
            prefetch.spawn(format!("prefetch {number}"), move || {
                shared.source.read_blocks(file)
            })?;
        }
        let (shared, memory) = (prefetch.shared.clone(), memory.clone());
        prefetch.spawn("prefetch".into(), move || shared.place(&memory, on_failed))?;
        Ok(prefetch)
    }

    /// How far it is; nothing once all is there.
    pub fn progress(&self) -> Option<SnapshotProgress> {
        if self.is_complete() {
            return None;
        }
        let shared = &self.shared;
        let placed = shared
            .placed
            .iter()
            .map(|word| word.load(Ordering::Relaxed).count_ones());
        let blocks = &shared.source.blocks;
        let total_bytes: u64 = blocks.iter().map(|block| block.len).sum();
        Some(SnapshotProgress {
            done_bytes: total_bytes.min(u64::from(placed.sum::<u32>()) * BLOCK),
            total_bytes,
        })
    }

    /// Whether all pages are there.
    pub fn is_complete(&self) -> bool {
        self.shared.complete.load(Ordering::Acquire)
    }

    /// Adds every page to `into` that is not there yet and will hold something. Those that are there are found by other
    /// means, afterwards: more of them may have come by then.
    pub fn unplaced(&self, into: &mut PageSet) -> Result<(), SnapshotError> {
        if self.is_complete() {
            return Ok(());
        }
        let shared = &self.shared;
        shared
            .source
            .unplaced(|index| is_placed(&shared.placed, index), into)
    }

    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> Result<(), SnapshotError> {
        let thread = threads::spawn(Role::Pages, name, body).map_err(SnapshotError::Thread)?;
        self.threads.push(thread);
        Ok(())
    }
}

impl PrefetchShared {
    /// The placer's thread.
    fn place(&self, memory: &GuestMemory, on_failed: impl FnOnce(String)) {
        let began = Instant::now();
        let mut descriptor = self.userfault.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(userfault) = &*descriptor else { return };
        let placed = Placer::new(memory, userfault, &self.source, self.placed.clone()).run();
        match placed {
            Ok(PlacingEnd::Complete) => {
                // Closed before that is said: from here on the kernel itself fills pages that are zero.
                *descriptor = None;
                self.source.release();
                self.complete.store(true, Ordering::Release);
                let mib = self.source.blocks.iter().map(|block| block.len).sum::<u64>() >> 20;
                tracing::info!(
                    "all of the memory is here: {mib} MiB after {} ms",
                    began.elapsed().as_millis()
                );
            }
            Ok(PlacingEnd::Cancelled) => {}
            Err(error) => {
                self.source.end();
                on_failed(migration::chain(&error));
            }
        }
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.shared.source.end();
        for thread in self.threads.drain(..) {
            // A panic in it has been reported by the panic hook.
            let _ = thread.join();
        }
        // A thread that still waits for a page, of a device that is left behind, must not read zeroes.
        let mut userfault = self
            .shared
            .userfault
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::forget(userfault.take());
    }
}
