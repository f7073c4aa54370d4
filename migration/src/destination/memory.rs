//! Writes arriving pages to guest memory, from several streams at once.
//!
//! Must not touch a page for which only zeroes came and that was never written: it is zero already, and the touch would
//! allocate it. Every range of the peer's is checked before memory is written.

use std::sync::atomic::{AtomicU64, Ordering};

use migration_io::{Decompressor, GuestMemory, MemoryRange, Method, PAGE_SIZE, zero_range, zeroed_words};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::ReceiveError;
use super::disks::Disks;
use crate::control::Control;
use crate::digest::digest;
use crate::link::{Link, LinkError};
use crate::options::Compression;
use crate::page_set::{PageSetError, masks};
use crate::protocol::{CompressedTable, PageTable};
use crate::space::is_disk;

/// Guest memory, and what has arrived of it.
#[derive(Debug)]
pub(super) struct Incoming {
    memory: GuestMemory,
    disks: Disks,
    written: WrittenPages,
    /// Bytes that came over the streams, counted when a batch is complete.
    received: AtomicU64,
    /// Bytes of batches under way, counted as they come.
    under_way: AtomicU64,
}

/// A stream's buffers for pages that are not received in place (compressed ones and those of disks), allocated when the
/// first such page comes.
#[derive(Default)]
pub(super) struct StreamBuffers {
    /// The content of a batch, compressed or of a disk.
    block: Vec<u8>,
    decompressor: Option<Decompressor>,
}

/// The pages that were written. All others are zero, and to touch them would allocate them.
#[derive(Debug)]
struct WrittenPages {
    regions: Vec<WrittenRegion>,
}

#[derive(Debug)]
struct WrittenRegion {
    gpa: u64,
    pages: u64,
    words: Vec<AtomicU64>,
}

impl Incoming {
    pub(super) fn new(memory: GuestMemory, disks: Disks) -> Self {
        let written = WrittenPages::of(&memory);
        Self {
            memory,
            disks,
            written,
            received: AtomicU64::new(0),
            under_way: AtomicU64::new(0),
        }
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(super) fn disks(&self) -> &Disks {
        &self.disks
    }

    /// Bytes that came over the streams so far.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// A number that changes whenever bytes have come over a stream.
    pub(super) fn activity(&self) -> u64 {
        self.received()
            .wrapping_add(self.under_way.load(Ordering::Relaxed))
    }

    /// The counter to which a stream adds bytes as they come, for [`Incoming::activity`].
    pub(super) fn under_way(&self) -> &AtomicU64 {
        &self.under_way
    }

    /// Receives one batch of pages, whose content is next on the stream. Returns how many bytes of guest memory it
    /// covers, zero pages included.
    pub(super) fn receive_batch(
        &self,
        link: &mut Link<'_>,
        table: PageTable,
        buffers: &mut StreamBuffers,
    ) -> Result<u64, ReceiveError> {
        if table.data.iter().chain(&table.zero).any(|span| is_disk(span.gpa)) {
            self.disks.receive_batch(link, &table, &mut buffers.block)?;
            return Ok(0);
        }
        let bytes = table.page_bytes();
        let data: Vec<MemoryRange> = table.data.into_iter().map(MemoryRange::from).collect();
        let zero: Vec<MemoryRange> = table.zero.into_iter().map(MemoryRange::from).collect();
        // The whole table is checked before anything is written.
        for range in data.iter().chain(&zero) {
            self.written.locate(*range).map_err(ReceiveError::Pages)?;
        }
        for range in &data {
            self.written.insert(*range).map_err(ReceiveError::Pages)?;
        }
        link.receive_pages(&self.memory, &data)?;
        for range in zero {
            self.zero(range)?;
        }
        Ok(bytes)
    }

    /// A digest of memory and disks, made by this many threads; a cancel ends it.
    pub(super) fn digest(&self, threads: usize, control: &Control) -> Result<u128, ReceiveError> {
        let check = || match control.interruption() {
            Some(interruption) => Err(LinkError::from(interruption).into()),
            None => Ok(()),
        };
        digest(&self.memory, threads, |_| false, self.disks.readers(), check)
    }

    /// Receives one batch of compressed pages, whose block is next on the stream.
    pub(super) fn receive_compressed(
        &self,
        link: &mut Link<'_>,
        table: CompressedTable,
        buffers: &mut StreamBuffers,
    ) -> Result<(), ReceiveError> {
        let method = match table.method {
            Compression::Lz4 => Method::Lz4,
            Compression::Zstd => Method::Zstd,
        };
        let pages: Vec<MemoryRange> = table.pages.into_iter().map(MemoryRange::from).collect();
        for range in &pages {
            self.written.insert(*range).map_err(ReceiveError::Pages)?;
        }
        // The protocol makes the block shorter than its pages, so this is less than 1 MiB.
        buffers.block.resize(table.len as usize, 0);
        link.receive_bytes(&mut buffers.block, "a block of compressed pages")?;
        let decompressor = match buffers.decompressor.take() {
            Some(decompressor) => decompressor,
            None => Decompressor::new()?,
        };
        let decompressor = buffers.decompressor.insert(decompressor);
        Ok(decompressor.decompress(method, &buffers.block, &self.memory, &pages)?)
    }

    /// Counts bytes that a stream has received.
    pub(super) fn count_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// An error unless a range consists of whole pages of one region.
    pub(super) fn check_range(&self, range: MemoryRange) -> Result<(), PageSetError> {
        self.written.locate(range).map(|_| ())
    }

    /// Whether any page of a range was written.
    pub(super) fn is_written(&self, range: MemoryRange) -> bool {
        self.written
            .runs(range, |word, mask| word.load(Ordering::Relaxed) & mask)
            .is_ok_and(|mut runs| runs.next().is_some())
    }

    /// Zeroes the pages of a range that were written.
    fn zero(&self, range: MemoryRange) -> Result<(), ReceiveError> {
        // Forgets that they were written, so that zeroing them again costs nothing.
        let take = |word: &AtomicU64, mask: u64| word.fetch_and(!mask, Ordering::Relaxed) & mask;
        for run in self.written.runs(range, take).map_err(ReceiveError::Pages)? {
            zero_range(&self.memory, run)?;
        }
        Ok(())
    }
}

impl WrittenPages {
    fn of(memory: &GuestMemory) -> Self {
        let region = |region: &vm_memory::GuestRegionMmap<_>| {
            let pages = region.len() / PAGE_SIZE;
            WrittenRegion {
                gpa: region.start_addr().0,
                pages,
                words: zeroed_words(pages.div_ceil(64) as usize),
            }
        };
        Self {
            regions: memory.iter().map(region).collect(),
        }
    }

    fn insert(&self, range: MemoryRange) -> Result<(), PageSetError> {
        let (region, first, end) = self.locate(range)?;
        for (word, mask) in masks(first, end) {
            region.words[word].fetch_or(mask, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The runs of written pages within a range; each lies within 64 pages. `select` gets a word of the bits and a mask of
    /// those in the range, and returns the written ones among them.
    fn runs(
        &self,
        range: MemoryRange,
        select: impl Fn(&AtomicU64, u64) -> u64,
    ) -> Result<impl Iterator<Item = MemoryRange>, PageSetError> {
        let (region, first, end) = self.locate(range)?;
        Ok(masks(first, end).flat_map(move |(word, mask)| {
            // No memory order is needed: the protocol does not allow two streams to have the same page in one round.
            let mut bits = select(&region.words[word], mask);
            std::iter::from_fn(move || {
                let from = bits.trailing_zeros();
                if from == 64 {
                    return None;
                }
                let count = (!(bits >> from)).trailing_zeros().min(64 - from);
                bits &= !((u64::MAX >> (64 - count)) << from);
                Some(MemoryRange {
                    gpa: region.gpa + (word as u64 * 64 + u64::from(from)) * PAGE_SIZE,
                    len: u64::from(count) * PAGE_SIZE,
                })
            })
        }))
    }

    /// The region of a range of whole pages, the range's first page in it, and the page after its last.
    fn locate(&self, range: MemoryRange) -> Result<(&WrittenRegion, u64, u64), PageSetError> {
        let MemoryRange { gpa, len } = range;
        let below = self.regions.partition_point(|region| region.gpa <= gpa);
        let region = below.checked_sub(1).and_then(|at| self.regions.get(at));
        let whole = gpa.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE) && len > 0;
        let located = region.filter(|_| whole).and_then(|region| {
            let first = (gpa - region.gpa) / PAGE_SIZE;
            let end = first.checked_add(len / PAGE_SIZE)?;
            (end <= region.pages).then_some((region, first, end))
        });
        located.ok_or(PageSetError::OutOfRange { gpa, len })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;

    proptest! {
        #[test]
        fn what_was_written_is_found_in_runs(
            ranges in proptest::collection::vec((0u64..300, 1u64..150), 0..8),
            look in (0u64..200, 1u64..200),
        ) {
            let memory = GuestMemory::from_ranges(&[(GuestAddress(1 << 20), 200 << 12)]).unwrap();
            let written = WrittenPages::of(&memory);
            let range = |(first, count): (u64, u64)| MemoryRange {
                gpa: (1 << 20) + first * PAGE_SIZE,
                len: count * PAGE_SIZE,
            };
            let mut model = BTreeSet::new();
            for (first, count) in ranges {
                let fits = first + count <= 200;
                prop_assert_eq!(written.insert(range((first, count))).is_ok(), fits);
                model.extend((first..first + count).filter(|_| fits));
            }
            match written.runs(range(look), |word, mask| word.load(Ordering::Relaxed) & mask) {
                Ok(runs) => {
                    let found: Vec<u64> = runs
                        .flat_map(|run| (run.gpa..run.gpa + run.len).step_by(4096))
                        .map(|gpa| (gpa - (1 << 20)) / PAGE_SIZE)
                        .collect();
                    let expected: Vec<u64> = model.range(look.0..look.0 + look.1).copied().collect();
                    prop_assert_eq!(found, expected);
                }
                Err(_) => prop_assert!(look.0 + look.1 > 200),
            }
        }
    }

    #[test]
    fn what_is_not_in_memory_is_refused() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(1 << 20), 1 << 20)]).unwrap();
        let written = WrittenPages::of(&memory);
        for (gpa, len) in [
            (0, 4096),
            ((1 << 20) + 1, 4096),
            (1 << 20, 1),
            (1 << 20, 0),
            (1 << 20, (1 << 20) + 4096),
            (u64::MAX - 4095, 4096),
            (2 << 20, 4096),
            (1 << 20, u64::MAX - 4095),
        ] {
            assert!(
                written.insert(MemoryRange { gpa, len }).is_err(),
                "{gpa:#x} {len:#x}"
            );
        }
    }
}
