//! A snapshot of memory that the guest goes on writing to: it is protected against writes at the moment of the snapshot,
//! and a page is copied before it changes.
//!
//! ```text
//!  the guest ── writes to a protected page ──▶ userfaultfd ──▶ copier: copies the block (2 MiB) to a buffer,
//!      ▲                                                          lifts its protection ──▶ writers: to the file
//!      └────────────────── goes on with its write ◀───────────────┘
//! ```
//!
//! The copier takes blocks that the guest waits for first, and all others one after the other. There are only so many
//! buffers, half of them for what the guest waits for: a guest that writes faster than the disk waits for the disk.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use devices::GuestMemory;
use migration::MemoryKind;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use threads::{Role, joined};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::addresses::BlockAddresses;
use super::blocks::{BLOCK, MemoryBlock, StoredBlocks, blocks, open_again, runs, slice, write_block};
use super::queue::BlockQueue;
use super::{SnapshotError, SnapshotWatch};
use crate::memory::{self, PAGE_SIZE, ProtectedPages, RamRegion, Userfault, UserfaultEvent};

/// Blocks that were copied and are not in the file yet.
const BUFFERS: usize = 64;
/// So many of them are kept for blocks that the guest waits for: 64 MiB that it may be ahead of the disk.
const KEPT: usize = 32;
/// How often the copier looks for a buffer, or for the end of the writers, while there is nothing else to do.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Memory that is copied while the guest runs. When this is dropped, nothing is protected any more.
#[derive(Debug)]
pub struct LiveCopy {
    memory: GuestMemory,
    userfault: Userfault,
    /// For blocks that were copied and are not in the file yet.
    buffers: Vec<GuestMemory>,
}

/// What the copier and the writers share.
struct CopyState {
    /// Buffers that no block is in.
    free: Vec<GuestMemory>,
    /// Blocks that were copied and not written.
    copied: VecDeque<CopiedBlock>,
    /// Whether no more blocks will be copied.
    ended: bool,
    /// Whether a writer has failed.
    failed: bool,
}

/// A block as it was at the moment of the snapshot.
struct CopiedBlock {
    index: usize,
    /// From address 0 on.
    content: GuestMemory,
    /// A bit for each page that may hold something.
    candidates: Vec<u64>,
}

struct Copies {
    state: Mutex<CopyState>,
    changed: Condvar,
}

impl LiveCopy {
    /// Makes ready to protect that memory, while the guest runs. Fails where memory of that kind cannot be protected.
    pub fn prepare(memory: &GuestMemory) -> Result<Self, SnapshotError> {
        let mapped = memory.iter().any(|region| region.file_offset().is_some());
        if memory::kind(memory) != MemoryKind::Anonymous || mapped {
            return Err(SnapshotError::NotLive);
        }
        check_kernel()?;
        // A page that is merged with another one would no longer show that it is protected.
        memory::unmerge(memory)?;
        let buffer = || memory::create(&[(0, BLOCK)], MemoryKind::Anonymous);
        Ok(Self {
            memory: memory.clone(),
            userfault: Userfault::register_for_writes(memory)?,
            buffers: (0..BUFFERS).map(|_| buffer()).collect::<Result<_, _>>()?,
        })
    }

    /// The memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Protects all of it: what is copied from here on is what is in it now. Of a machine that is paused. After an error
    /// nothing is protected.
    pub fn protect(&self) -> Result<(), SnapshotError> {
        let protect = |region: &RamRegion| self.userfault.protect(region.as_ptr() as u64, region.len());
        if let Err(error) = self.memory.iter().try_for_each(protect) {
            self.unprotect()?;
            return Err(error.into());
        }
        Ok(())
    }

    fn unprotect(&self) -> Result<(), SnapshotError> {
        for region in self.memory.iter() {
            self.userfault.unprotect(region.as_ptr() as u64, region.len())?;
        }
        Ok(())
    }

    /// Copies it to the file. Calls `resume` once what the guest writes can be answered: not before that may it run, or any
    /// thread that writes to its memory. Where that comes to nothing, `resume` is dropped when nothing is protected any more.
    pub(super) fn write(
        mut self,
        resume: impl FnOnce(),
        file: &File,
        path: &Path,
        watch: &SnapshotWatch,
    ) -> Result<StoredBlocks, SnapshotError> {
        let blocks = blocks(&self.memory);
        watch.begin(blocks.iter().map(|block| block.len).sum());
        let copies = Copies::new(std::mem::take(&mut self.buffers));
        let checksums = Mutex::new((vec![0; blocks.len()], 0));
        let write = || {
            let _failed = FailCopyOnPanic(&copies);
            let result = copies.write_blocks(&blocks, file, path, &checksums, watch);
            result.inspect_err(|_| copies.fail())
        };
        thread::scope(|scope| {
            let copy = || {
                let _ended = EndOnDrop(&self, &copies);
                self.copy(&blocks, &copies, watch)
            };
            let failed = |failure| Err(SnapshotError::Thread(io::Error::other(failure)));
            let copier = match threads::spawn_scoped(scope, Role::Helper, "copier", copy) {
                Ok(copier) => copier,
                Err(error) => {
                    self.unprotect()?;
                    return Err(SnapshotError::Thread(error));
                }
            };
            resume();
            let writer = threads::spawn_scoped(scope, Role::Helper, "snapshot", write)
                .map_err(SnapshotError::Thread)
                .inspect_err(|_| copies.fail());
            let here = write();
            let there = joined(writer?.join()).unwrap_or_else(failed);
            let copied = joined(copier.join()).unwrap_or_else(failed);
            here.and(there).and(copied)
        })?;
        let (checksums, pages) = checksums.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(StoredBlocks { checksums, pages })
    }

    /// The copier: copies every block before it changes, and answers the guest until all are written.
    fn copy(
        &self,
        blocks: &[MemoryBlock],
        copies: &Copies,
        watch: &SnapshotWatch,
    ) -> Result<(), SnapshotError> {
        let (mut queue, addresses) = (BlockQueue::new(blocks.len()), BlockAddresses::of(&self.memory));
        let mut protected = ProtectedPages::open()?;
        loop {
            watch.check()?;
            self.process_events(&mut queue, &addresses)?;
            if copies.are_ended(queue.is_empty()) {
                return Ok(());
            }
            let kept = if queue.is_demanded() { 0 } else { KEPT };
            let next = (!queue.is_empty()).then(|| copies.take_buffer(kept)).flatten();
            let Some((content, index)) = next.and_then(|content| Some((content, queue.take()?))) else {
                self.wait_for_event()?;
                continue;
            };
            let block = &blocks[index];
            let region = self.memory.iter().nth(block.region);
            let region = region.ok_or_else(|| SnapshotError::Thread(io::ErrorKind::NotFound.into()))?;
            // What was written for the first time since is not protected, and was zero.
            let candidates = protected.find(region, block.page, block.len / PAGE_SIZE)?;
            for run in runs(&candidates) {
                let (start, len) = (run.start * PAGE_SIZE, (run.end - run.start) * PAGE_SIZE);
                let from = slice(&self.memory, block.gpa + start, len, Path::new("memory"))?;
                let to = slice(&content, start, len, Path::new("memory"))?;
                from.copy_to_volatile_slice(to);
            }
            self.userfault.unprotect(addresses.address_of(index), block.len)?;
            copies.lock().copied.push_back(CopiedBlock {
                index,
                content,
                candidates,
            });
            copies.changed.notify_all();
        }
    }

    /// Reads all events that there are.
    fn process_events(
        &self,
        queue: &mut BlockQueue,
        addresses: &BlockAddresses,
    ) -> Result<(), SnapshotError> {
        while let Some(event) = self.userfault.next_event()? {
            let UserfaultEvent::Fault { address } = event else {
                continue;
            };
            let left = addresses
                .block_of(address)
                .is_some_and(|index| queue.demand(index));
            // The block was copied between the fault and its event: the thread may wait for a page that is not protected.
            if !left {
                self.userfault.wake(address & !(PAGE_SIZE - 1), PAGE_SIZE)?;
            }
        }
        Ok(())
    }

    /// Waits for an event, but only for a moment: there may be a buffer by then.
    fn wait_for_event(&self) -> Result<(), SnapshotError> {
        let mut ready = [PollFd::new(&self.userfault, PollFlags::IN)];
        let moment = Timespec {
            tv_sec: 0,
            tv_nsec: LOOK_AGAIN.as_nanos() as i64,
        };
        match poll(&mut ready, Some(&moment)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(SnapshotError::Thread(error.into())),
        }
    }
}

impl Copies {
    fn new(buffers: Vec<GuestMemory>) -> Self {
        Self {
            state: Mutex::new(CopyState {
                free: buffers,
                copied: VecDeque::new(),
                ended: false,
                failed: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// A free buffer, if there are more than `kept`.
    fn take_buffer(&self, kept: usize) -> Option<GuestMemory> {
        let mut state = self.lock();
        if state.free.len() > kept {
            state.free.pop()
        } else {
            None
        }
    }

    /// Whether a writer has failed, or all blocks are written, where all are copied.
    fn are_ended(&self, all_copied: bool) -> bool {
        let mut state = self.lock();
        state.ended |= all_copied;
        if all_copied {
            self.changed.notify_all();
        }
        state.failed || (all_copied && state.free.len() == BUFFERS)
    }

    /// A writer: writes blocks until all were copied and written.
    fn write_blocks(
        &self,
        blocks: &[MemoryBlock],
        file: &File,
        path: &Path,
        checksums: &Mutex<(Vec<u64>, u64)>,
        watch: &SnapshotWatch,
    ) -> Result<(), SnapshotError> {
        let mut file = open_again(file, OpenOptions::new().write(true), path)?;
        loop {
            let idle = |state: &mut CopyState| state.copied.is_empty() && !state.ended && !state.failed;
            let waited = self.changed.wait_while(self.lock(), idle);
            let mut state = waited.unwrap_or_else(PoisonError::into_inner);
            if state.failed {
                return Ok(());
            }
            let Some(copied) = state.copied.pop_front() else {
                return Ok(());
            };
            drop(state);
            let block = &blocks[copied.index];
            let (checksum, count) =
                write_block(&mut file, block, &copied.content, 0, &copied.candidates, path)?;
            let mut found = checksums.lock().unwrap_or_else(PoisonError::into_inner);
            found.0[copied.index] = checksum;
            found.1 += count;
            drop(found);
            self.lock().free.push(copied.content);
            self.changed.notify_all();
            watch.advance(block.len)?;
        }
    }

    fn fail(&self) {
        self.lock().failed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, CopyState> {
        // Nothing that holds it panics; if it did, the values would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets all threads end when a writer panics.
struct FailCopyOnPanic<'a>(&'a Copies);

impl Drop for FailCopyOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail();
        }
    }
}

/// When the copier ends, also by a panic, lets the writers end, and the guest go on: a writer may hang.
struct EndOnDrop<'a>(&'a LiveCopy, &'a Copies);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.unprotect() {
            tracing::error!(%error, "memory stays protected until all has ended");
        }
        self.1.lock().ended = true;
        self.1.changed.notify_all();
    }
}

/// Fails where the kernel does not show which pages are protected: all would be taken for pages that were written since.
fn check_kernel() -> Result<(), SnapshotError> {
    let page = memory::create(&[(0, memory::MIN_MEMORY)], MemoryKind::Anonymous)?;
    page.write_obj(1u8, GuestAddress(0))
        .map_err(|error| SnapshotError::Thread(io::Error::other(error)))?;
    let userfault = Userfault::register_for_writes(&page)?;
    for region in page.iter() {
        userfault.protect(region.as_ptr() as u64, region.len())?;
        if ProtectedPages::open()?.find(region, 0, 1)? != [1] {
            return Err(SnapshotError::NotShown);
        }
    }
    Ok(())
}
