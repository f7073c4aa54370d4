//! The bitmaps of what the machine's own devices wrote, one for each region, and checked parts of such bitmaps.
//!
//! A device writes, then marks; a stream clears, then reads. Either the mark comes before the clearing, and
//! then the reader sees what was written (both are sequentially consistent operations on one word), or it
//! comes after it and stays. So no write is lost, in whatever order the marks of devices and of vCPUs are
//! cleared.

use devices::GuestMemory;
use guest_memory::PageMarks;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::MemoryError;
use crate::memory::PAGE_SIZE;
use migration::{PageSet, PageSetError};

/// One region of guest RAM.
pub type RamRegion = GuestRegionMmap<PageMarks>;

/// Part of a region's bitmap, checked: whole words from page `first` on, without a bit past the region's end.
#[derive(Clone, Copy)]
pub(super) struct MarkedWords<'a> {
    pub(super) slot: u32,
    pub(super) region: &'a RamRegion,
    pub(super) first: u64,
    /// Pages that the words have bits for: 64 each, fewer at the end of the region.
    pub(super) pages: u32,
    pub(super) words: &'a [u64],
}

impl<'a> MarkedWords<'a> {
    pub(super) fn new(
        memory: &'a GuestMemory,
        region: usize,
        first: u64,
        words: &'a [u64],
    ) -> Result<Self, MemoryError> {
        let index = region;
        let found = u32::try_from(index).ok().zip(memory.iter().nth(index));
        let total = found.map_or(0, |(_, region)| pages(region));
        let refused = || MemoryError::MarkedWords {
            region: index,
            expected: total,
            first,
            got: words.len(),
        };
        let (slot, region) = found.ok_or_else(refused)?;
        let left = total.checked_sub(first).ok_or_else(refused)?;
        let beyond = words.len() as u64 > left.div_ceil(64);
        let pages = left.min(words.len() as u64 * 64);
        let stray = !pages.is_multiple_of(64) && words.last().is_some_and(|last| last >> (pages % 64) != 0);
        let pages = u32::try_from(pages).ok();
        match pages {
            Some(pages) if first.is_multiple_of(64) && !beyond && !stray => Ok(Self {
                slot,
                region,
                first,
                pages,
                words,
            }),
            _ => Err(refused()),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Clears the marks of devices.
    pub(super) fn clear_device_writes(&self) {
        let mapping: &MmapRegion<PageMarks> = self.region;
        let first = (self.first / 64) as usize;
        for (number, word) in (first..).zip(self.words) {
            mapping.bitmap().clear(number, *word);
        }
    }
}

/// Pages of a region.
pub(super) fn pages(region: &RamRegion) -> u64 {
    region.len() / PAGE_SIZE
}

/// Adds the marks of devices in region number `index`, which stay.
pub(super) fn add_device_writes(
    index: usize,
    region: &RamRegion,
    into: &mut PageSet,
) -> Result<(), PageSetError> {
    let mapping: &MmapRegion<PageMarks> = region;
    let mut marked = mapping.bitmap().marked();
    marked.try_for_each(|(word, marks)| into.insert_words(index, word, &[marks]))
}

#[cfg(test)]
mod tests {
    use migration::MemoryKind;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::create;

    fn device_writes(region: &RamRegion) -> Vec<(usize, u64)> {
        let mapping: &MmapRegion<PageMarks> = region;
        mapping.bitmap().marked().collect()
    }

    #[test]
    fn device_writes_stay_until_they_are_cleared() {
        for kind in [MemoryKind::Anonymous, MemoryKind::Shared] {
            let memory = create(&[(0, 100 << 12)], kind).unwrap();
            memory.write_slice(&[1; 2], GuestAddress(4095)).unwrap();
            memory.write_slice(&[1], GuestAddress(99 << 12)).unwrap();
            let region = memory.iter().next().unwrap();
            for _ in 0..2 {
                assert_eq!(device_writes(region), [(0, 0b11), (1, 1 << 35)]);
            }
            let clear = |first, words: &[u64]| {
                MarkedWords::new(&memory, 0, first, words)
                    .unwrap()
                    .clear_device_writes();
            };
            clear(0, &[0b10]);
            assert_eq!(device_writes(region), [(0, 0b01), (1, 1 << 35)]);
            clear(64, &[u64::MAX >> 28]);
            assert_eq!(device_writes(region), [(0, 0b01)]);
        }
    }

    #[test]
    fn words_outside_the_region_are_refused() {
        let memory = create(&[(0, 100 << 12)], MemoryKind::Anonymous).unwrap();
        let check = |region, first, words: &[u64]| MarkedWords::new(&memory, region, first, words).is_ok();
        assert!(check(0, 0, &[u64::MAX, (1 << 36) - 1]) && check(0, 64, &[1]) && check(0, 0, &[]));
        assert!(!check(1, 0, &[0]), "no such region");
        assert!(!check(0, 1, &[0]), "not a multiple of 64");
        assert!(
            !check(0, 128, &[0]) && !check(0, u64::MAX - 63, &[0]),
            "past the end"
        );
        assert!(!check(0, 0, &[0, 0, 0]), "too long");
        assert!(!check(0, 64, &[1 << 36]), "a page past the end");
    }
}
