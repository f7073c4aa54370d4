//! Sets of guest pages.

mod error;
mod region;
#[cfg(test)]
mod tests;

pub use error::PageSetError;

use migration_io::{GuestMemory, MemoryRange, PAGE_SIZE};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::ports::MemoryRegion;
use region::RegionPages;

/// A set of pages of guest RAM. It takes memory and time for the parts of RAM that have some of their pages in it and some
/// not: neither much for a large guest with few pages in the set, nor with few that are not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    regions: Vec<RegionPages>,
}

impl PageSet {
    /// An empty set over regions that pass [`PageSet::check_regions`].
    pub fn new(regions: &[MemoryRegion]) -> Result<Self, PageSetError> {
        Self::check_regions(regions)?;
        let empty = |region: &MemoryRegion| RegionPages::new(region.gpa, region.len / PAGE_SIZE);
        Ok(Self {
            regions: regions.iter().map(empty).collect(),
        })
    }

    /// Whether regions are made of whole pages, ascending and without overlap. Allocates nothing, so that a
    /// peer's regions can be checked before they are believed.
    pub fn check_regions(regions: &[MemoryRegion]) -> Result<(), PageSetError> {
        let mut end = 0;
        for &MemoryRegion { gpa, len } in regions {
            let in_pages = gpa.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
            let (true, Some(region_end)) = (in_pages && len > 0 && gpa >= end, gpa.checked_add(len)) else {
                return Err(PageSetError::Region { gpa, len });
            };
            end = region_end;
        }
        Ok(())
    }

    /// An empty set over the regions of guest memory.
    pub fn of(memory: &GuestMemory) -> Result<Self, PageSetError> {
        let regions: Vec<MemoryRegion> = memory
            .iter()
            .map(|region| MemoryRegion {
                gpa: region.start_addr().0,
                len: region.len(),
            })
            .collect();
        Self::new(&regions)
    }

    /// Adds the page that holds an address.
    pub fn insert_gpa(&mut self, gpa: u64) -> Result<(), PageSetError> {
        self.insert_range(MemoryRange {
            gpa: gpa & !(PAGE_SIZE - 1),
            len: PAGE_SIZE,
        })
    }

    /// Adds every page that a range within one region touches.
    pub fn insert_range(&mut self, range: MemoryRange) -> Result<(), PageSetError> {
        let (region, first, end) = self.locate(range)?;
        self.regions[region].insert(first, end);
        Ok(())
    }

    /// Adds every page that a range within one region touches, if none of them is in the set. Answers whether
    /// that is so.
    pub fn insert_new(&mut self, range: MemoryRange) -> Result<bool, PageSetError> {
        let (region, first, end) = self.locate(range)?;
        let pages = &mut self.regions[region];
        let new = pages.next(first, true).is_none_or(|found| found >= end);
        if new {
            pages.insert(first, end);
        }
        Ok(new)
    }

    /// Adds the pages of a region by a bitmap in the layout of KVM's dirty log: bit `n` of the whole is page
    /// `n` of the region (`KVM_GET_DIRTY_LOG`, Documentation/virt/kvm/api.rst).
    pub fn insert_bitmap(&mut self, region: usize, bitmap: &[u64]) -> Result<(), PageSetError> {
        let expected = self.regions.get(region).map_or(0, RegionPages::words);
        if expected != bitmap.len() {
            return Err(self.refused_bitmap(region, bitmap.len(), false));
        }
        self.insert_words(region, 0, bitmap)
    }

    /// Adds the pages of a part of such a bitmap: from word `from` on, none of them past the region's end.
    pub fn insert_words(&mut self, region: usize, from: usize, words: &[u64]) -> Result<(), PageSetError> {
        let pages = self.regions.get(region).map_or(0, RegionPages::pages);
        let most = self.regions.get(region).map_or(0, RegionPages::words);
        let is_last = from.checked_add(words.len()) == Some(most);
        let stray = is_last
            && !pages.is_multiple_of(64)
            && words.last().is_some_and(|last| last >> (pages % 64) != 0);
        match self.regions.get_mut(region) {
            Some(pages) if from <= most && words.len() <= most - from && !stray => {
                pages.insert_words(from, words);
                Ok(())
            }
            _ => Err(self.refused_bitmap(region, from.saturating_add(words.len()), stray)),
        }
    }

    fn refused_bitmap(&self, region: usize, got: usize, stray: bool) -> PageSetError {
        match self.regions.get(region) {
            None => PageSetError::NoRegion {
                index: region,
                count: self.regions.len(),
            },
            Some(pages) => PageSetError::Bitmap {
                gpa: pages.gpa(),
                pages: pages.pages(),
                expected: pages.words(),
                got,
                stray,
            },
        }
    }

    /// Adds the pages of `count` words of a region's bitmap, from word `from` on, that are in a set over the same regions.
    pub(crate) fn insert_part(&mut self, other: &PageSet, region: usize, from: usize, count: usize) {
        if let (Some(to), Some(pages)) = (self.regions.get_mut(region), other.regions.get(region)) {
            pages
                .parts(from, count)
                .for_each(|(at, words)| to.insert_words(at, words));
        }
    }

    /// Adds all pages.
    pub fn insert_all(&mut self) {
        self.regions
            .iter_mut()
            .for_each(|pages| pages.insert(0, pages.pages()));
    }

    /// The parts of the regions' bitmaps that have pages in them: the region's number, the number of the first word, and
    /// the words. What is between them is empty; so may be words of them.
    pub fn filled(&self) -> impl Iterator<Item = (usize, usize, &[u64])> {
        let regions = self.regions.iter().enumerate();
        regions.flat_map(|(region, pages)| pages.filled().map(move |(from, words)| (region, from, words)))
    }

    /// `count` words of a region's bitmap from word `from` on; words past its end are zero.
    pub fn words(&self, region: usize, from: usize, count: usize) -> Vec<u64> {
        let mut words = vec![0; count];
        if let Some(pages) = self.regions.get(region) {
            for (at, part) in pages.parts(from, count) {
                words[at - from..][..part.len()].copy_from_slice(part);
            }
        }
        words
    }

    /// How many pages are in `count` words of a region's bitmap from word `from` on.
    pub(crate) fn count(&self, region: usize, from: usize, count: usize) -> u64 {
        let parts = self.regions.get(region).into_iter();
        let words = parts.flat_map(|pages| pages.parts(from, count).flat_map(|(_, words)| words));
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// The first address of a region, if there is one of this number.
    pub(crate) fn region_gpa(&self, region: usize) -> Option<u64> {
        self.regions.get(region).map(RegionPages::gpa)
    }

    /// Takes the first pages out, about so many, into a set of their own.
    pub(crate) fn split_off(&mut self, pages: u64) -> PageSet {
        let mut left = pages;
        let regions = self.regions.iter_mut().map(|pages| pages.split_off(&mut left));
        PageSet {
            regions: regions.collect(),
        }
    }

    /// Turns the set into that of all other pages.
    pub(crate) fn invert(&mut self) {
        self.regions.iter_mut().for_each(RegionPages::invert);
    }

    /// Adds the pages of another set, whose regions are the same or the first of these.
    pub fn union(&mut self, other: &PageSet) -> Result<(), PageSetError> {
        let same = |(a, b): (&RegionPages, &RegionPages)| a.gpa() == b.gpa() && a.pages() == b.pages();
        if self.regions.len() < other.regions.len() || !self.regions.iter().zip(&other.regions).all(same) {
            return Err(PageSetError::OtherRegions);
        }
        let pairs = self.regions.iter_mut().zip(&other.regions);
        pairs.for_each(|(pages, more)| pages.union(more));
        Ok(())
    }

    /// Removes the pages of another set whose regions are the same, or begin with the same, or are the first of these.
    pub(crate) fn subtract(&mut self, other: &PageSet) {
        let pairs = self.regions.iter_mut().zip(&other.regions);
        pairs.for_each(|(pages, less)| pages.subtract(less));
    }

    /// An error unless a range lies within one region.
    pub fn check_range(&self, range: MemoryRange) -> Result<(), PageSetError> {
        self.locate(range).map(|_| ())
    }

    /// Whether the page that holds an address is in the set.
    pub fn contains(&self, gpa: u64) -> bool {
        let range = MemoryRange {
            gpa: gpa & !(PAGE_SIZE - 1),
            len: PAGE_SIZE,
        };
        self.locate(range)
            .is_ok_and(|(region, page, _)| self.regions[region].contains(page))
    }

    /// Number of pages.
    pub fn len(&self) -> u64 {
        self.regions.iter().map(RegionPages::len).sum()
    }

    /// Number of pages that there are, in the set or not.
    pub(crate) fn pages_in_all(&self) -> u64 {
        self.regions.iter().map(RegionPages::pages).sum()
    }

    /// Whether there is no page in the set.
    pub fn is_empty(&self) -> bool {
        self.regions.iter().all(RegionPages::is_empty)
    }

    /// Removes all pages.
    pub fn clear(&mut self) {
        drop(self.take());
    }

    /// Takes all pages out, into a set of their own.
    pub fn take(&mut self) -> PageSet {
        let empty = |pages: &RegionPages| RegionPages::new(pages.gpa(), pages.pages());
        let regions = self.regions.iter().map(empty).collect();
        std::mem::replace(self, PageSet { regions })
    }

    /// The pages as ranges, ascending: each as long as it can be, but not over `cap` bytes (at least a page).
    pub fn ranges(&self, cap: u64) -> Ranges<'_> {
        Ranges {
            set: self,
            region: 0,
            page: 0,
            cap: (cap / PAGE_SIZE).max(1),
        }
    }

    /// Index of the region of a range, and the pages in it that it touches: first, and the one after the last.
    fn locate(&self, range: MemoryRange) -> Result<(usize, u64, u64), PageSetError> {
        let MemoryRange { gpa, len } = range;
        let outside = PageSetError::OutOfRange { gpa, len };
        let Some(region) = self
            .regions
            .partition_point(|pages| pages.gpa() <= gpa)
            .checked_sub(1)
        else {
            return Err(outside);
        };
        let pages = &self.regions[region];
        let start = gpa - pages.gpa();
        match start.checked_add(len) {
            Some(end) if len > 0 && end <= pages.pages() * PAGE_SIZE => {
                Ok((region, start / PAGE_SIZE, end.div_ceil(PAGE_SIZE)))
            }
            _ => Err(outside),
        }
    }
}

/// The ranges of a [`PageSet`]; see [`PageSet::ranges`].
#[derive(Clone, Debug)]
pub struct Ranges<'a> {
    set: &'a PageSet,
    region: usize,
    page: u64,
    cap: u64,
}

impl Iterator for Ranges<'_> {
    type Item = MemoryRange;

    fn next(&mut self) -> Option<MemoryRange> {
        loop {
            let pages = self.set.regions.get(self.region)?;
            let Some(first) = pages.next(self.page, true) else {
                self.region += 1;
                self.page = 0;
                continue;
            };
            let end = pages
                .next(first, false)
                .unwrap_or(pages.pages())
                .min(first + self.cap);
            self.page = end;
            return Some(MemoryRange {
                gpa: pages.gpa() + first * PAGE_SIZE,
                len: (end - first) * PAGE_SIZE,
            });
        }
    }
}

/// The words of a bitmap that hold the pages from `first` up to `end`, with those pages' bits.
pub(crate) fn masks(first: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    let mut page = first;
    std::iter::from_fn(move || {
        let count = end
            .checked_sub(page)
            .filter(|left| *left > 0)?
            .min(64 - page % 64);
        let item = ((page / 64) as usize, (u64::MAX >> (64 - count)) << (page % 64));
        page += count;
        Some(item)
    })
}
