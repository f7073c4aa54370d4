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
        let mut queue = BlockQueue::new(blocks.len());
        let mut protected = ProtectedPages::open()?;
        loop {
            watch.check()?;
            self.process_events(&mut queue, blocks)?;
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
            self.userfault
                .unprotect(region.as_ptr() as u64 + block.page * PAGE_SIZE, block.len)?;
            copies.lock().copied.push_back(CopiedBlock {
                index,
                content,
                candidates,
            });
            copies.changed.notify_all();
        }
    }

    /// Reads all events that there are.
    fn process_events(&self, queue: &mut BlockQueue, blocks: &[MemoryBlock]) -> Result<(), SnapshotError> {
        while let Some(event) = self.userfault.next_event()? {
            let UserfaultEvent::Fault { address } = event else {
                continue;
            };
            let left = self
                .block_of(address, blocks)
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

    /// The block that an address of this process is in.
    fn block_of(&self, address: u64, blocks: &[MemoryBlock]) -> Option<usize> {
        let mut first = 0;
        for region in self.memory.iter() {
            let offset = address.wrapping_sub(region.as_ptr() as u64);
            if offset < region.len() {
                return Some(first + (offset / BLOCK) as usize).filter(|index| *index < blocks.len());
            }
            first += region.len().div_ceil(BLOCK) as usize;
        }
        None
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use super::*;

    /// Two regions, of which the second does not end with a whole block.
    const RANGES: [(u64, u64); 2] = [(0, 16 << 20), (1 << 32, (9 << 20) + 3 * PAGE_SIZE)];

    fn pages() -> impl Iterator<Item = u64> {
        RANGES
            .into_iter()
            .flat_map(|(gpa, len)| (gpa..gpa + len).step_by(PAGE_SIZE as usize))
    }

    /// What a page holds before; every fifth was never touched.
    fn before(gpa: u64) -> Option<u64> {
        (!(gpa / PAGE_SIZE).is_multiple_of(5)).then_some(gpa | 1)
    }

    fn guest() -> GuestMemory {
        let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
        for gpa in pages() {
            match before(gpa) {
                Some(stamp) => memory.write_obj(stamp, GuestAddress(gpa)).unwrap(),
                // The kernel's page of zeroes.
                None if gpa % 3 == 0 => assert_eq!(read(&memory, gpa), 0),
                None => {}
            }
        }
        memory
    }

    /// The memory that is in the file.
    fn stored(file: &File, path: &Path, stored: &StoredBlocks) -> GuestMemory {
        let memory = memory::create(&RANGES, MemoryKind::Anonymous).unwrap();
        let watch = SnapshotWatch::default();
        crate::snapshot::blocks::read(&memory, file, path, None, &stored.checksums, &watch).unwrap();
        memory
    }

    fn read(memory: &GuestMemory, gpa: u64) -> u64 {
        memory.read_obj(GuestAddress(gpa)).unwrap()
    }

    fn file(directory: &tempfile::TempDir) -> (std::path::PathBuf, File) {
        let path = directory.path().join("memory");
        let file = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        file.set_len(RANGES.iter().map(|(_, len)| len).sum()).unwrap();
        (path, file)
    }

    #[test]
    fn what_is_written_meanwhile_is_not_in_it_and_not_lost() {
        let directory = tempfile::tempdir().unwrap();
        for round in 0..5u64 {
            let ((path, file), memory) = (file(&directory), guest());
            let copy = LiveCopy::prepare(&memory).unwrap();
            copy.protect().unwrap();
            let (running, begun) = (AtomicBool::new(false), Instant::now());
            let found = thread::scope(|scope| {
                for writer in 0..3u64 {
                    let (memory, running) = (&memory, &running);
                    scope.spawn(move || {
                        while !running.load(Ordering::Acquire) {
                            assert!(begun.elapsed() < Duration::from_secs(10));
                            thread::yield_now();
                        }
                        // From the end and from the begin, over all pages, also those that were never there.
                        let mut all: Vec<u64> = pages().filter(|gpa| gpa / PAGE_SIZE % 3 == writer).collect();
                        if (round + writer) % 2 == 0 {
                            all.reverse();
                        }
                        all.iter()
                            .for_each(|gpa| memory.write_obj(gpa | 2, GuestAddress(*gpa)).unwrap());
                    });
                }
                let resume = || running.store(true, Ordering::Release);
                copy.write(resume, &file, &path, &SnapshotWatch::default())
                    .unwrap()
            });
            assert_eq!(found.pages, pages().filter_map(before).count() as u64);
            let stored = stored(&file, &path, &found);
            for gpa in pages() {
                assert_eq!(read(&stored, gpa), before(gpa).unwrap_or(0), "{gpa:#x}");
                assert_eq!(read(&memory, gpa), gpa | 2, "{gpa:#x}");
            }
        }
    }

    #[test]
    fn a_disk_that_fails_or_a_cancel_lets_the_guest_go_on() {
        let directory = tempfile::tempdir().unwrap();
        for cancelled in [false, true] {
            let ((path, file), memory) = (file(&directory), guest());
            let copy = LiveCopy::prepare(&memory).unwrap();
            copy.protect().unwrap();
            let watch = SnapshotWatch::default();
            if cancelled {
                watch.cancel();
            }
            let full = File::options().read(true).write(true).open("/dev/full").unwrap();
            let file = if cancelled { &file } else { &full };
            let failed = copy.write(|| {}, file, &path, &watch).unwrap_err();
            assert_eq!(matches!(failed, SnapshotError::Cancelled), cancelled, "{failed}");
            // Nothing is protected any more.
            pages().for_each(|gpa| memory.write_obj(gpa | 2, GuestAddress(gpa)).unwrap());
        }
    }

    #[test]
    fn a_disk_that_hangs_lets_the_guest_write_once_the_snapshot_is_cancelled() {
        let (memory, watch) = (guest(), SnapshotWatch::default());
        let mut copy = LiveCopy::prepare(&memory).unwrap();
        copy.protect().unwrap();
        copy.buffers.truncate(2);
        let copies = Copies::new(std::mem::take(&mut copy.buffers));
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            // There are no writers: no buffer ever comes back.
            let copying = scope.spawn(|| {
                let _ended = EndOnDrop(&copy, &copies);
                copy.copy(&blocks(&memory), &copies, &watch)
            });
            scope.spawn(|| {
                pages().for_each(|gpa| memory.write_obj(gpa | 2, GuestAddress(gpa)).unwrap());
                done.store(true, Ordering::Release);
            });
            thread::sleep(Duration::from_millis(100));
            assert!(
                !done.load(Ordering::Acquire),
                "there were buffers for two blocks alone"
            );
            watch.cancel();
            assert!(matches!(copying.join().unwrap(), Err(SnapshotError::Cancelled)));
        });
        assert!(done.load(Ordering::Acquire));
    }

    #[test]
    fn memory_that_cannot_be_protected_is_refused() {
        let shared = memory::create(&RANGES, MemoryKind::Shared).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (_, file) = file(&directory);
        let mapped = memory::map_private(&RANGES, &file).unwrap();
        for memory in [shared, mapped] {
            assert!(matches!(LiveCopy::prepare(&memory), Err(SnapshotError::NotLive)));
        }
    }
}
