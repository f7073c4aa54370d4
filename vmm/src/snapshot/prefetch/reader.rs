//! The threads that read blocks of a snapshot's memory and compare them with their checksums.
//!
//! They do not touch the guest's memory: a damaged block never gets there.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use devices::GuestMemory;
use migration::{MemoryKind, MemoryRange, PageSet};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{self, PAGE_SIZE};
use crate::snapshot::SnapshotError;
use crate::snapshot::blocks::{self, BLOCK, MemoryBlock, data_ranges, read_block, runs};
use crate::snapshot::queue::BlockQueue;

/// Blocks that have been read and not placed yet, or that are being read: enough to keep the disk busy meanwhile.
const BUFFERS: usize = 4;

/// What the readers and the thread that places pages share.
#[derive(Debug)]
pub(super) struct BlockSource {
    path: PathBuf,
    pub(super) blocks: Vec<MemoryBlock>,
    /// One for each block.
    checksums: Vec<u64>,
    /// Whether the guest's memory takes whole blocks only: huge pages of hugetlbfs.
    pub(super) whole: bool,
    state: Mutex<BlockSourceState>,
    /// Notified when a reader may go on.
    changed: Condvar,
    /// Readable when a block was read, a reader has failed, or the threads are to end.
    event: OwnedFd,
}

#[derive(Debug)]
struct BlockSourceState {
    queue: BlockQueue,
    /// Buffers that no block is in.
    free: Vec<GuestMemory>,
    read: VecDeque<LoadedBlock>,
    failure: Option<SnapshotError>,
    ending: bool,
}

/// A block that was read, and not yet placed.
#[derive(Debug)]
pub(super) struct LoadedBlock {
    pub(super) index: usize,
    /// Its content, from address 0 on. Of pages that are not `stored` it holds what was there before.
    pub(super) content: GuestMemory,
    /// A bit for each page that is not zero.
    pub(super) stored: Vec<u64>,
}

/// Has the placer fail when a reader panics: the block that it had would never come.
struct FailOnPanic<'a>(&'a BlockSource);

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(SnapshotError::Thread(std::io::Error::other(
                "a thread that reads it panicked",
            )));
        }
    }
}

impl BlockSource {
    /// A source for the memory that is in that file, with a checksum for each block.
    pub(super) fn new(
        memory: &GuestMemory,
        path: PathBuf,
        checksums: Vec<u64>,
    ) -> Result<Self, SnapshotError> {
        let blocks = blocks::blocks(memory);
        let buffer = || memory::create(&[(0, BLOCK)], MemoryKind::Anonymous);
        let free = (0..BUFFERS).map(|_| buffer()).collect::<Result<_, _>>()?;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| SnapshotError::Thread(errno.into()))?;
        let state = BlockSourceState {
            queue: BlockQueue::new(blocks.len()),
            free,
            read: VecDeque::new(),
            failure: None,
            ending: false,
        };
        Ok(Self {
            path,
            blocks,
            checksums,
            whole: memory::kind(memory) == MemoryKind::HugePages,
            state: Mutex::new(state),
            changed: Condvar::new(),
            event,
        })
    }

    /// Readable when [`BlockSource::loaded`] or [`BlockSource::is_ending`] may have something new.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// The work of a reader: reads blocks until all were taken, one cannot be read, or the threads are to end.
    pub(super) fn read_blocks(&self, mut file: File) {
        let _ended = FailOnPanic(self);
        let mut read = || -> Result<(), SnapshotError> {
            while let Some((index, content)) = self.take() {
                let loaded = self.read_block(&mut file, index, content)?;
                self.lock().read.push_back(loaded);
                self.wake();
            }
            Ok(())
        };
        if let Err(error) = read() {
            self.fail(error);
        }
    }

    fn fail(&self, error: SnapshotError) {
        self.lock().failure.get_or_insert(error);
        self.wake();
        self.changed.notify_all();
    }

    fn read_block(
        &self,
        file: &mut File,
        index: usize,
        content: GuestMemory,
    ) -> Result<LoadedBlock, SnapshotError> {
        let block = &self.blocks[index];
        let ranges = data_ranges(file, block, &self.path)?;
        let read = read_block(file, block, &ranges, &content, 0, &self.path)?;
        if read.checksum != self.checksums[index] {
            return Err(block.damaged(&self.path, self.checksums[index], read.checksum));
        }
        if self.whole {
            let zero: Vec<u64> = read.stored.iter().map(|word| !word).collect();
            for run in runs(&zero) {
                let len = (run.end.min(block.len / PAGE_SIZE) - run.start) * PAGE_SIZE;
                content
                    .write_slice(&vec![0; len as usize], GuestAddress(run.start * PAGE_SIZE))
                    .map_err(|error| SnapshotError::io(&self.path)(std::io::Error::other(error)))?;
            }
        }
        Ok(LoadedBlock {
            index,
            content,
            stored: read.stored,
        })
    }

    /// The next block to read, and a buffer for it. Waits for a buffer.
    fn take(&self) -> Option<(usize, GuestMemory)> {
        let idle =
            |state: &mut BlockSourceState| state.free.is_empty() && !state.ending && state.failure.is_none();
        let waited = self.changed.wait_while(self.lock(), idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.ending || state.failure.is_some() {
            return None;
        }
        let buffer = state.free.pop()?;
        match state.queue.take() {
            Some(index) => Some((index, buffer)),
            None => {
                state.free.push(buffer);
                None
            }
        }
    }

    /// The guest waits for a block: it is read before all others.
    pub(super) fn demand(&self, index: usize) {
        self.lock().queue.demand(index);
    }

    /// A block that was read. An error if one could not be read, or is damaged.
    pub(super) fn loaded(&self) -> Result<Option<LoadedBlock>, SnapshotError> {
        let mut state = self.lock();
        match state.failure.take() {
            Some(error) => Err(error),
            None => Ok(state.read.pop_front()),
        }
    }

    /// Takes back the buffer of a block that was placed.
    pub(super) fn give_back(&self, buffer: GuestMemory) {
        self.lock().free.push(buffer);
        self.changed.notify_one();
    }

    /// Ends the threads.
    pub(super) fn end(&self) {
        self.lock().ending = true;
        self.changed.notify_all();
        self.wake();
    }

    /// Whether the threads are to end.
    pub(super) fn is_ending(&self) -> bool {
        self.lock().ending
    }

    /// Adds every page of the blocks that are not all zero to `into`, but for those blocks that `is_placed` names. By their
    /// checksums: whoever has changed the file meanwhile finds out when the block is read.
    pub(super) fn unplaced(
        &self,
        is_placed: impl Fn(usize) -> bool,
        into: &mut PageSet,
    ) -> Result<(), SnapshotError> {
        let zero = blocks::checksum_of_zeroes();
        for (index, (block, checksum)) in self.blocks.iter().zip(&self.checksums).enumerate() {
            if *checksum != zero && !is_placed(index) {
                let (gpa, len) = (block.gpa, block.len);
                into.insert_range(MemoryRange { gpa, len })
                    .map_err(memory::MemoryError::from)?;
            }
        }
        Ok(())
    }

    /// Lets the buffers go: all blocks are placed.
    pub(super) fn release(&self) {
        self.lock().free = Vec::new();
    }

    fn wake(&self) {
        // Fails only when the counter is at its limit, and then it is readable anyway.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, BlockSourceState> {
        // Nothing that holds it panics; if it did, the values would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
