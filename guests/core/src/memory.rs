//! The guest's usable pages, numbered through over the holes between them.

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Ranges of usable memory: page numbers count over all of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct UsableRanges {
    list: [UsableRange; Self::MAX],
    used: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct UsableRange {
    start: u64,
    pages: u64,
}

/// Pages `first..first + count`: what one CPU takes care of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Number of the first page.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl UsableRanges {
    /// Most ranges; more would be a memory map that no microVM has.
    pub const MAX: usize = 8;

    /// Adds the whole pages in `start..end`. False if there is no room for another range.
    pub fn add(&mut self, start: u64, end: u64) -> bool {
        let start = start.next_multiple_of(PAGE);
        let pages = (end / PAGE).saturating_sub(start / PAGE);
        if pages == 0 {
            return true;
        }
        let Some(slot) = self.list.get_mut(self.used) else {
            return false;
        };
        *slot = UsableRange { start, pages };
        self.used += 1;
        true
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.list.iter().map(|range| range.pages).sum()
    }

    /// Physical address of page `number`; `None` beyond the last.
    pub fn address(&self, mut number: u64) -> Option<u64> {
        for range in &self.list[..self.used] {
            if number < range.pages {
                return Some(range.start + number * PAGE);
            }
            number -= range.pages;
        }
        None
    }

    /// End of the highest range.
    pub fn end(&self) -> u64 {
        self.list
            .iter()
            .map(|range| range.start + range.pages * PAGE)
            .max()
            .unwrap_or(0)
    }
}

impl Share {
    /// The part of these pages that CPU `cpu` of `cpus` has; the parts differ by one page at most.
    pub fn part(self, cpu: u32, cpus: u32) -> Self {
        let (cpu, cpus) = (u64::from(cpu), u64::from(cpus.max(1)));
        let start = self.count * cpu / cpus;
        let end = self.count * (cpu + 1) / cpus;
        Self {
            first: self.first + start,
            count: end - start,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_count_over_the_hole() {
        let mut ranges = UsableRanges::default();
        assert!(ranges.add(0x10_0800, 0x10_3fff));
        assert!(ranges.add(0x20_0000, 0x20_0010));
        assert!(ranges.add(0x1_0000_0000, 0x1_0000_2000));
        assert_eq!(ranges.pages(), 4);
        let addresses: Vec<_> = (0..5).map(|page| ranges.address(page)).collect();
        let expected = [
            Some(0x10_1000),
            Some(0x10_2000),
            Some(0x1_0000_0000),
            Some(0x1_0000_1000),
            None,
        ];
        assert_eq!(addresses, expected);
        assert_eq!(ranges.end(), 0x1_0000_2000);
    }

    #[test]
    fn a_range_too_many_is_an_error() {
        let mut ranges = UsableRanges::default();
        for n in 0..UsableRanges::MAX as u64 {
            assert!(ranges.add(n * 2 * PAGE, (n * 2 + 1) * PAGE));
        }
        assert!(!ranges.add(1 << 30, 1 << 31));
    }

    #[test]
    fn parts_cover_everything_once() {
        let share = Share {
            first: 10,
            count: 1001,
        };
        let mut next = 10;
        for cpu in 0..7 {
            let part = share.part(cpu, 7);
            assert_eq!(part.first, next);
            assert!((143..=144).contains(&part.count));
            next += part.count;
        }
        assert_eq!(next, 1011);
    }
}
