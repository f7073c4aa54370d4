//! Sets of guest pages.

use migration_io::{GuestMemory, MemoryRange, PAGE_SIZE};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::ports::MemoryRegion;

/// A set of pages of guest RAM: one bit per page, one bitmap per region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    regions: Vec<Bits>,
}

/// Why something is not a set of guest pages, or does not fit into one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageSetError {
    /// A region is empty, not made of pages, or overlaps the one before it.
    #[error("region {gpa:#x}+{len:#x} is empty, not made of whole pages, out of order or too high")]
    Region {
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// Pages that are not in any region, or not in one alone.
    #[error("pages {gpa:#x}+{len:#x} are not within one region of guest RAM")]
    OutOfRange {
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// No such region.
    #[error("there is no region {index}: there are {count}")]
    NoRegion {
        /// The region that was asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// A bitmap has another size than its region, or bits past its end.
    #[error("bitmap of region {gpa:#x}: expected {expected} words with bits for {pages} pages, got {got} words{}",
        if *stray { " and bits past the end" } else { "" })]
    Bitmap {
        /// The region's first guest-physical address.
        gpa: u64,
        /// Pages of the region.
        pages: u64,
        /// Words of 64 bits that they take.
        expected: usize,
        /// Words that came.
        got: usize,
        /// Whether bits past the last page are set.
        stray: bool,
    },
    /// Two sets are over different regions.
    #[error("page sets are over different regions")]
    OtherRegions,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Bits {
    gpa: u64,
    pages: u64,
    words: Vec<u64>,
}

impl PageSet {
    /// An empty set over regions that pass [`PageSet::check_regions`].
    pub fn new(regions: &[MemoryRegion]) -> Result<Self, PageSetError> {
        Self::check_regions(regions)?;
        let bits = |region: &MemoryRegion| {
            let pages = region.len / PAGE_SIZE;
            Bits {
                gpa: region.gpa,
                pages,
                words: vec![0; pages.div_ceil(64) as usize],
            }
        };
        Ok(Self {
            regions: regions.iter().map(bits).collect(),
        })
    }

    /// Whether regions are made of whole pages, ascending and without overlap. Allocates nothing, so that a
    /// peer's regions can be looked at before they are believed.
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
        let words = &mut self.regions[region].words;
        masks(first, end).for_each(|(word, mask)| words[word] |= mask);
        Ok(())
    }

    /// Adds every page that a range within one region touches, if none of them is in the set. Answers whether
    /// that is so.
    pub fn insert_new(&mut self, range: MemoryRange) -> Result<bool, PageSetError> {
        let (region, first, end) = self.locate(range)?;
        let words = &mut self.regions[region].words;
        let new = masks(first, end).all(|(word, mask)| words[word] & mask == 0);
        if new {
            masks(first, end).for_each(|(word, mask)| words[word] |= mask);
        }
        Ok(new)
    }

    /// Adds the pages of a region by a bitmap in the layout of KVM's dirty log: bit `n` of the whole is page
    /// `n` of the region (`KVM_GET_DIRTY_LOG`, Documentation/virt/kvm/api.rst).
    pub fn insert_bitmap(&mut self, region: usize, bitmap: &[u64]) -> Result<(), PageSetError> {
        let count = self.regions.len();
        let Some(bits) = self.regions.get_mut(region) else {
            return Err(PageSetError::NoRegion { index: region, count });
        };
        let stray = !bits.pages.is_multiple_of(64)
            && bitmap.last().is_some_and(|last| last >> (bits.pages % 64) != 0);
        if bitmap.len() != bits.words.len() || stray {
            let (gpa, pages, expected) = (bits.gpa, bits.pages, bits.words.len());
            return Err(PageSetError::Bitmap {
                gpa,
                pages,
                expected,
                got: bitmap.len(),
                stray,
            });
        }
        for (word, more) in bits.words.iter_mut().zip(bitmap) {
            *word |= more;
        }
        Ok(())
    }

    /// Adds all pages.
    pub fn insert_all(&mut self) {
        for bits in &mut self.regions {
            bits.words.fill(u64::MAX);
            if let (Some(last), partial @ 1..) = (bits.words.last_mut(), bits.pages % 64) {
                *last = (1 << partial) - 1;
            }
        }
    }

    /// The bitmaps of the regions, each with the region's number.
    pub(crate) fn words(&self) -> impl Iterator<Item = (usize, &[u64])> {
        self.regions
            .iter()
            .map(|region| region.words.as_slice())
            .enumerate()
    }

    /// The bitmap of a region, if there is one of this number.
    pub fn region_words(&self, region: usize) -> Option<&[u64]> {
        self.regions.get(region).map(|bits| bits.words.as_slice())
    }

    /// The first address of a region, if there is one of this number.
    pub(crate) fn region_gpa(&self, region: usize) -> Option<u64> {
        self.regions.get(region).map(|bits| bits.gpa)
    }

    /// Adds the pages of a part of a region's bitmap, from word `from` on, taken from a set over the same
    /// regions. What is not within the region is left out.
    pub(crate) fn insert_words(&mut self, region: usize, from: usize, words: &[u64]) {
        let Some(bits) = self.regions.get_mut(region) else {
            return;
        };
        for (word, more) in bits.words.iter_mut().skip(from).zip(words) {
            *word |= more;
        }
    }

    /// Takes the first pages out, about so many, into a set of their own.
    pub(crate) fn split_off(&mut self, pages: u64) -> PageSet {
        let mut left = pages;
        let mut rest = self.take();
        for (taken, bits) in self.regions.iter_mut().zip(&mut rest.regions) {
            for (taken, word) in taken.words.iter_mut().zip(&mut bits.words) {
                if left == 0 {
                    break;
                }
                left = left.saturating_sub(u64::from(word.count_ones()));
                *taken = std::mem::take(word);
            }
        }
        std::mem::replace(self, rest)
    }

    /// Turns the set into that of all other pages.
    pub(crate) fn invert(&mut self) {
        for bits in &mut self.regions {
            bits.words.iter_mut().for_each(|word| *word = !*word);
            if let (Some(last), partial @ 1..) = (bits.words.last_mut(), bits.pages % 64) {
                *last &= (1 << partial) - 1;
            }
        }
    }

    /// Adds the pages of another set over the same regions.
    pub fn union(&mut self, other: &PageSet) -> Result<(), PageSetError> {
        let same = |(a, b): (&Bits, &Bits)| a.gpa == b.gpa && a.pages == b.pages;
        if self.regions.len() != other.regions.len() || !self.regions.iter().zip(&other.regions).all(same) {
            return Err(PageSetError::OtherRegions);
        }
        for (bits, more) in self.regions.iter_mut().zip(&other.regions) {
            bits.words
                .iter_mut()
                .zip(&more.words)
                .for_each(|(word, more)| *word |= more);
        }
        Ok(())
    }

    /// Removes the pages of another set whose regions are the same, or begin with the same, or are the first of these.
    pub(crate) fn subtract(&mut self, other: &PageSet) {
        for (bits, less) in self.regions.iter_mut().zip(&other.regions) {
            bits.words
                .iter_mut()
                .zip(&less.words)
                .for_each(|(word, less)| *word &= !less);
        }
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
        self.locate(range).is_ok_and(|(region, page, _)| {
            self.regions[region].words[(page / 64) as usize] >> (page % 64) & 1 == 1
        })
    }

    /// Number of pages.
    pub fn len(&self) -> u64 {
        self.regions
            .iter()
            .flat_map(|bits| &bits.words)
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Number of pages that there are, in the set or not.
    pub(crate) fn pages_in_all(&self) -> u64 {
        self.regions.iter().map(|bits| bits.pages).sum()
    }

    /// Whether there is no page in the set.
    pub fn is_empty(&self) -> bool {
        self.regions
            .iter()
            .all(|bits| bits.words.iter().all(|word| *word == 0))
    }

    /// Removes all pages.
    pub fn clear(&mut self) {
        self.regions.iter_mut().for_each(|bits| bits.words.fill(0));
    }

    /// Takes all pages out, into a set of their own.
    pub fn take(&mut self) -> PageSet {
        let empty = |bits: &Bits| Bits {
            gpa: bits.gpa,
            pages: bits.pages,
            words: vec![0; bits.words.len()],
        };
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
            .partition_point(|bits| bits.gpa <= gpa)
            .checked_sub(1)
        else {
            return Err(outside);
        };
        let bits = &self.regions[region];
        let start = gpa - bits.gpa;
        match start.checked_add(len) {
            Some(end) if len > 0 && end <= bits.pages * PAGE_SIZE => {
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
            let bits = self.set.regions.get(self.region)?;
            let Some(first) = bits.next(self.page, true) else {
                self.region += 1;
                self.page = 0;
                continue;
            };
            let end = bits
                .next(first, false)
                .unwrap_or(bits.pages)
                .min(first + self.cap);
            self.page = end;
            return Some(MemoryRange {
                gpa: bits.gpa + first * PAGE_SIZE,
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

impl Bits {
    /// The first page from `from` on that is in the set (or, with `wanted` false, is not).
    fn next(&self, from: u64, wanted: bool) -> Option<u64> {
        let flip = if wanted { 0 } else { u64::MAX };
        let mut at = (from / 64) as usize;
        let mut word = (self.words.get(at)? ^ flip) & (u64::MAX << (from % 64));
        while word == 0 {
            at += 1;
            word = self.words.get(at)? ^ flip;
        }
        let page = at as u64 * 64 + u64::from(word.trailing_zeros());
        (page < self.pages).then_some(page)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const HIGH: u64 = 1 << 32;

    /// 70 pages at 0 and 130 at 4 GiB.
    fn set() -> PageSet {
        let regions = [
            MemoryRegion {
                gpa: 0,
                len: 70 * PAGE_SIZE,
            },
            MemoryRegion {
                gpa: HIGH,
                len: 130 * PAGE_SIZE,
            },
        ];
        PageSet::new(&regions).unwrap()
    }

    fn range(gpa: u64, len: u64) -> MemoryRange {
        MemoryRange { gpa, len }
    }

    #[test]
    fn all_pages_are_two_ranges_or_as_many_as_the_cap_makes() {
        let mut pages = set();
        assert!(pages.is_empty() && pages.ranges(1 << 20).next().is_none());
        pages.insert_all();
        assert_eq!(pages.len(), 200);
        let whole: Vec<_> = pages.ranges(u64::MAX).collect();
        assert_eq!(whole, [range(0, 70 << 12), range(HIGH, 130 << 12)]);
        assert_eq!(pages.ranges(0).count(), 200);
        assert_eq!(pages.ranges(64 << 12).count(), 2 + 3);
        let taken = pages.take();
        assert_eq!((pages.len(), taken.len()), (0, 200));
        pages.union(&taken).unwrap();
        assert_eq!(pages, taken);
        let mut less = PageSet::new(&[MemoryRegion {
            gpa: 0,
            len: 70 * PAGE_SIZE,
        }])
        .unwrap();
        less.insert_range(range(65 << 12, 4 << 12)).unwrap();
        pages.subtract(&less);
        assert_eq!(pages.len(), 196);
        assert!(pages.contains(64 << 12) && !pages.contains(65 << 12) && pages.contains(69 << 12));
        less.subtract(&taken);
        assert!(less.is_empty());
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        let mut pages = set();
        for bad in [
            range(70 << 12, 1),
            range(69 << 12, 8192),
            range(HIGH - 1, 1),
            range(u64::MAX, 2),
            range(0, 0),
        ] {
            let expected = PageSetError::OutOfRange {
                gpa: bad.gpa,
                len: bad.len,
            };
            assert_eq!(pages.insert_range(bad), Err(expected));
        }
        assert!(pages.insert_gpa(u64::MAX).is_err() && !pages.contains(u64::MAX));
        assert!(matches!(
            pages.insert_bitmap(2, &[]),
            Err(PageSetError::NoRegion { index: 2, count: 2 })
        ));
        assert!(matches!(
            pages.insert_bitmap(0, &[0]),
            Err(PageSetError::Bitmap {
                expected: 2,
                got: 1,
                ..
            })
        ));
        assert!(matches!(
            pages.insert_bitmap(0, &[0, 1 << 6]),
            Err(PageSetError::Bitmap { stray: true, .. })
        ));
        assert!(pages.is_empty());
        assert_eq!(
            pages.union(&PageSet::new(&[]).unwrap()),
            Err(PageSetError::OtherRegions)
        );
    }

    #[test]
    fn regions_are_checked() {
        for (gpa, len) in [(1, 4096), (0, 4095), (0, 0), (u64::MAX - 4095, 8192)] {
            let error = PageSet::new(&[MemoryRegion { gpa, len }]).unwrap_err();
            assert_eq!(error, PageSetError::Region { gpa, len });
        }
        let overlap = [
            MemoryRegion { gpa: 0, len: 8192 },
            MemoryRegion { gpa: 4096, len: 4096 },
        ];
        assert!(PageSet::new(&overlap).is_err());
    }

    proptest! {
        #[test]
        fn a_set_holds_what_was_put_in(
            ranges in proptest::collection::vec((0u64..130, 1u64..40, any::<bool>()), 0..12),
            bitmap in any::<[u64; 2]>(),
            cap in 1u64..80,
        ) {
            let (mut pages, mut model) = (set(), BTreeSet::new());
            for (first, count, high) in ranges {
                let gpa = if high { HIGH } else { 0 } + first * PAGE_SIZE;
                if pages.insert_range(range(gpa, count * PAGE_SIZE)).is_ok() {
                    model.extend((0..count).map(|page| gpa + page * PAGE_SIZE));
                }
            }
            let bitmap = [bitmap[0], bitmap[1] & 0x3f];
            pages.insert_bitmap(0, &bitmap).unwrap();
            let in_bitmap = |page: &u64| bitmap[(page / 64) as usize] >> (page % 64) & 1 == 1;
            model.extend((0u64..70).filter(in_bitmap).map(|page| page * PAGE_SIZE));
            prop_assert_eq!(pages.len(), model.len() as u64);
            prop_assert!(model.iter().all(|gpa| pages.contains(gpa + 5)));
            let ranges: Vec<_> = pages.ranges(cap * PAGE_SIZE).collect();
            prop_assert!(ranges.iter().all(|range| range.pages() <= cap));
            let gpas: Vec<u64> =
                ranges.iter().flat_map(|r| (r.gpa..r.gpa + r.len).step_by(4096)).collect();
            prop_assert_eq!(gpas, model.into_iter().collect::<Vec<_>>());
        }
    }
}
