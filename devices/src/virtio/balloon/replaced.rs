//! Which pages of privately mapped files were given up, so that zeroes are mapped over them. Without the zeroes they
//! would show the file's content again.

use std::collections::BTreeMap;

use super::PAGE_SIZE;

/// Most runs of such pages. Each may split a mapping of this process in three, of which Linux lets it have 65530; pages that
/// would be one run too many stay the guest's.
const MAX_RUNS: usize = 16 << 10;

/// A bit for each page of each region, by the region's address.
#[derive(Debug, Default)]
pub(super) struct Replaced {
    regions: BTreeMap<u64, Vec<u64>>,
    runs: usize,
}

/// A run of pages of a region that are all replaced or all not: the numbers of the first page and of the one after the
/// last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageRun {
    pub(super) first: u64,
    pub(super) end: u64,
    pub(super) is_replaced: bool,
}

impl Replaced {
    /// The runs of the pages from `first` to `end` of the region at address `region`, which has `len` bytes.
    pub(super) fn runs(&mut self, region: u64, len: u64, first: u64, end: u64) -> Vec<PageRun> {
        let words = self.words(region, len);
        let mut runs: Vec<PageRun> = Vec::new();
        for page in first..end {
            let is_replaced = is_set(words, page);
            match runs.last_mut() {
                Some(run) if run.is_replaced == is_replaced => run.end = page + 1,
                _ => runs.push(PageRun {
                    first: page,
                    end: page + 1,
                    is_replaced,
                }),
            }
        }
        runs
    }

    /// Whether `run`, which is not replaced, can be.
    pub(super) fn has_room_for(&mut self, region: u64, len: u64, run: PageRun) -> bool {
        self.runs_with(region, len, run) <= MAX_RUNS
    }

    /// Marks `run` as replaced.
    pub(super) fn insert(&mut self, region: u64, len: u64, run: PageRun) {
        self.runs = self.runs_with(region, len, run);
        let words = self.words(region, len);
        for page in run.first..run.end {
            if let Some(word) = words.get_mut((page / 64) as usize) {
                *word |= 1 << (page % 64);
            }
        }
    }

    /// Addresses and lengths in bytes of all replaced pages, ascending.
    pub(super) fn ranges(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::with_capacity(self.runs);
        for (region, words) in &self.regions {
            for (number, word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
                for bit in (0..64).filter(|bit| word >> bit & 1 != 0) {
                    let at = region + (number as u64 * 64 + bit) * PAGE_SIZE;
                    match ranges.last_mut() {
                        Some((first, len)) if *first + *len == at => *len += PAGE_SIZE,
                        _ => ranges.push((at, PAGE_SIZE)),
                    }
                }
            }
        }
        ranges
    }

    /// The number of runs with `run` replaced: a run joins its neighbours.
    fn runs_with(&mut self, region: u64, len: u64, run: PageRun) -> usize {
        let words = self.words(region, len);
        let before = run.first.checked_sub(1).is_some_and(|page| is_set(words, page));
        let after = is_set(words, run.end);
        (self.runs + 1).saturating_sub(usize::from(before) + usize::from(after))
    }

    fn words(&mut self, region: u64, len: u64) -> &mut Vec<u64> {
        let words = (len / PAGE_SIZE).div_ceil(64) as usize;
        self.regions.entry(region).or_insert_with(|| vec![0; words])
    }
}

fn is_set(words: &[u64], page: u64) -> bool {
    let word = words.get((page / 64) as usize);
    word.is_some_and(|word| word >> (page % 64) & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = (3 * MAX_RUNS as u64) << 12;

    fn run(first: u64, end: u64) -> PageRun {
        PageRun {
            first,
            end,
            is_replaced: false,
        }
    }

    #[test]
    fn runs_join_their_neighbours() {
        let mut replaced = Replaced::default();
        for (first, end, runs) in [(10, 12, 1), (14, 15, 2), (63, 66, 3), (12, 14, 2), (0, 1, 3)] {
            replaced.insert(1 << 32, LEN, run(first, end));
            assert_eq!(replaced.runs, runs);
        }
        let at = |page: u64| (1 << 32) + page * PAGE_SIZE;
        let expected = [(at(0), 4096), (at(10), 5 * 4096), (at(63), 3 * 4096)];
        assert_eq!(replaced.ranges(), expected);
        let set = |first, end| PageRun {
            is_replaced: true,
            ..run(first, end)
        };
        let runs = replaced.runs(1 << 32, LEN, 9, 17);
        assert_eq!(runs, [run(9, 10), set(10, 15), run(15, 17)]);
    }

    #[test]
    fn a_guest_cannot_use_up_the_mappings_of_this_process() {
        let mut replaced = Replaced::default();
        for number in 0..MAX_RUNS as u64 {
            assert!(replaced.has_room_for(0, LEN, run(2 * number, 2 * number + 1)));
            replaced.insert(0, LEN, run(2 * number, 2 * number + 1));
        }
        let far = 2 * MAX_RUNS as u64 + 10;
        assert!(!replaced.has_room_for(0, LEN, run(far, far + 1)));
        // Between two it makes them one.
        assert!(replaced.has_room_for(0, LEN, run(1, 2)));
        replaced.insert(0, LEN, run(1, 2));
        assert!(replaced.has_room_for(0, LEN, run(far, far + 1)));
    }
}
