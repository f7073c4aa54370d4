//! The thread that answers the guest's page faults and fills its memory with what was read.
//!
//! It alone reads the events of the userfaultfd and fills pages. So a page that the guest gives up is never filled with its
//! old content: the kernel fills no page while the event lies there unread, and once this thread has read it, it knows.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::GuestMemory;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::reader::{BlockSource, LoadedBlock};
use crate::memory::{Filled, PAGE_SIZE, Userfault, UserfaultEvent};
use crate::snapshot::SnapshotError;
use crate::snapshot::addresses::BlockAddresses;
use crate::snapshot::blocks::{BLOCK, runs};

/// Pages of a block, and words of a bit for each.
const PAGES: u64 = BLOCK / PAGE_SIZE;
const WORDS: usize = (PAGES / 64) as usize;

/// Which blocks were placed: a bit for each. For other threads.
pub(super) type PlacedBlocks = Vec<AtomicU64>;

/// Whether a block was placed.
pub(super) fn is_placed(placed: &PlacedBlocks, index: usize) -> bool {
    let word = placed.get(index / 64);
    word.is_some_and(|word| word.load(Ordering::Acquire) >> (index % 64) & 1 != 0)
}

/// The thread's state.
pub(super) struct Placer<'a> {
    userfault: &'a Userfault,
    source: &'a BlockSource,
    addresses: BlockAddresses,
    placed: Arc<PlacedBlocks>,
    left: usize,
    /// The pages of blocks that are not placed yet that the guest has given up: a bit for each.
    given_up: HashMap<usize, [u64; WORDS]>,
    /// The pages that threads wait for, by block.
    waiting: HashMap<usize, Vec<u64>>,
}

/// How the placing ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PlacingEnd {
    /// All pages are there.
    Complete,
    /// It was to end before that.
    Cancelled,
}

impl<'a> Placer<'a> {
    /// Fills that memory, which is registered with `userfault`.
    pub(super) fn new(
        memory: &GuestMemory,
        userfault: &'a Userfault,
        source: &'a BlockSource,
        placed: Arc<PlacedBlocks>,
    ) -> Self {
        Self {
            userfault,
            source,
            addresses: BlockAddresses::of(memory),
            placed,
            left: source.blocks.len(),
            given_up: HashMap::new(),
            waiting: HashMap::new(),
        }
    }

    /// Runs until all pages are there, or it is to end. On an error the pages that are missing stay so.
    pub(super) fn run(&mut self) -> Result<PlacingEnd, SnapshotError> {
        loop {
            if self.source.is_ending() {
                return Ok(PlacingEnd::Cancelled);
            }
            // What the guest waits for is asked for before pages are placed, which takes its time.
            self.process_events()?;
            while let Some(block) = self.source.loaded()? {
                self.place(&block)?;
                self.source.give_back(block.content);
                self.process_events()?;
            }
            if self.left == 0 {
                return Ok(PlacingEnd::Complete);
            }
            self.wait()?;
        }
    }

    /// Waits for an event, or for a block that was read.
    fn wait(&self) -> Result<(), SnapshotError> {
        let event = self.source.event();
        let mut ready = [
            PollFd::new(self.userfault, PollFlags::IN),
            PollFd::from_borrowed_fd(event, PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(SnapshotError::Thread(error.into())),
        }
        // What has come is looked for in any case.
        let _ = rustix::io::read(event, &mut [0; 8]);
        Ok(())
    }

    /// Reads all events that there are.
    fn process_events(&mut self) -> Result<(), SnapshotError> {
        while let Some(event) = self.userfault.next_event()? {
            match event {
                UserfaultEvent::Fault { address } => self.fault(address & !(PAGE_SIZE - 1))?,
                UserfaultEvent::Remove { start, end } => self.remove(start, end),
            }
        }
        Ok(())
    }

    /// A thread waits for a page.
    fn fault(&mut self, page: u64) -> Result<(), SnapshotError> {
        let Some(index) = self.addresses.block_of(page) else {
            return Ok(());
        };
        if is_placed(&self.placed, index) || self.is_given_up(index, page) {
            return self.zero(page);
        }
        self.waiting.entry(index).or_default().push(page);
        self.source.demand(index);
        Ok(())
    }

    /// The guest gives pages up: they are zero from now on, whatever the file has.
    fn remove(&mut self, start: u64, end: u64) {
        for page in (start..end).step_by(PAGE_SIZE as usize) {
            let Some(index) = self.addresses.block_of(page) else {
                continue;
            };
            if !is_placed(&self.placed, index) {
                let number = self.page_in_block(index, page);
                let bits = self.given_up.entry(index).or_insert([0; WORDS]);
                bits[(number / 64) as usize] |= 1 << (number % 64);
            }
        }
    }

    /// Fills the pages of a block that the file has something for. All others are zero: they stay missing, and those that
    /// are waited for are filled with zeroes.
    fn place(&mut self, block: &LoadedBlock) -> Result<(), SnapshotError> {
        let len = self.source.blocks[block.index].len;
        let start = self.addresses.address_of(block.index);
        let mut done = 0;
        // What the guest gives up meanwhile counts from the next run of pages on.
        while let Some(run) = self.next_run(block, done, len) {
            let (from, bytes) = (run.start * PAGE_SIZE, (run.end - run.start) * PAGE_SIZE);
            match self.userfault.copy(start + from, &block.content, from, bytes)? {
                Filled::Bytes(count) => done = run.start + count / PAGE_SIZE,
                Filled::There => done = run.start + 1,
                Filled::Blocked => {
                    done = run.start;
                    self.process_events()?;
                }
            }
        }
        if let Some(word) = self.placed.get(block.index / 64) {
            word.fetch_or(1 << (block.index % 64), Ordering::Release);
        }
        self.left -= 1;
        self.given_up.remove(&block.index);
        for page in self.waiting.remove(&block.index).unwrap_or_default() {
            self.zero(page)?;
        }
        Ok(())
    }

    /// The next run of pages of a block to fill, from page `done` on.
    fn next_run(&self, block: &LoadedBlock, done: u64, len: u64) -> Option<std::ops::Range<u64>> {
        if self.source.whole {
            return (done == 0).then_some(0..len / PAGE_SIZE);
        }
        let given_up = self.given_up.get(&block.index);
        let word = |(at, stored): (usize, &u64)| stored & !given_up.map_or(0, |bits| bits[at]);
        let wanted: Vec<u64> = block.stored.iter().enumerate().map(word).collect();
        let rest = runs(&wanted).into_iter().find(|run| run.end > done)?;
        Some(rest.start.max(done)..rest.end)
    }

    /// Fills a page with zeroes, if it is still missing.
    fn zero(&mut self, page: u64) -> Result<(), SnapshotError> {
        loop {
            let filled = if self.source.whole {
                // Every block that is placed is there as a whole.
                Filled::There
            } else {
                self.userfault.zero(page, PAGE_SIZE)?
            };
            match filled {
                Filled::Bytes(_) => return Ok(()),
                Filled::There => return Ok(self.userfault.wake(page, PAGE_SIZE)?),
                // Reading the event here could come back to this page: only those that give pages up are waited for.
                Filled::Blocked => self.read_removals()?,
            }
        }
    }

    /// Reads events until pages can be filled again; faults among them are answered afterwards.
    fn read_removals(&mut self) -> Result<(), SnapshotError> {
        let mut faults = Vec::new();
        while let Some(event) = self.userfault.next_event()? {
            match event {
                UserfaultEvent::Fault { address } => faults.push(address & !(PAGE_SIZE - 1)),
                UserfaultEvent::Remove { start, end } => self.remove(start, end),
            }
        }
        for page in faults {
            // The thread touches the page again, which is a new event.
            self.userfault.wake(page, PAGE_SIZE)?;
        }
        std::thread::yield_now();
        Ok(())
    }

    fn page_in_block(&self, index: usize, page: u64) -> u64 {
        (page - self.addresses.address_of(index)) / PAGE_SIZE
    }

    fn is_given_up(&self, index: usize, page: u64) -> bool {
        let number = self.page_in_block(index, page);
        let bits = self.given_up.get(&index);
        bits.is_some_and(|bits| bits[(number / 64) as usize] >> (number % 64) & 1 != 0)
    }
}
