//! Marks for pages that were written: a bit for each page, and above it a bit for each word of those.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use zerocopy::FromZeros;

use crate::PAGE_SIZE;

/// Which pages of one region of guest RAM were written since their marks were cleared.
///
/// Any thread may mark, look and clear, any number at a time. A word's bit in `used` says that the word may have marks: a
/// look passes over all others, which are nearly all of a large guest's. The bit is set after the word, and taken back by
/// a thread that has cleared the word's last mark, which then reads the word once more: either that thread sees a mark that
/// came meanwhile, or the thread that marks sees that the bit is gone. So a look finds every mark that was complete before
/// it, unless another thread is clearing marks of the same word just then.
#[derive(Debug, Default)]
pub struct PageMarks {
    /// Bit n of word m is page 64 m + n.
    words: Vec<AtomicU64>,
    /// Bit n of word m is set while word 64 m + n of `words` may have a mark.
    used: Vec<AtomicU64>,
    pages: usize,
}

impl PageMarks {
    /// Whether a page is marked. A page past the end is not.
    pub fn is_marked(&self, page: usize) -> bool {
        let word = self.words.get(page / 64).filter(|_| page < self.pages);
        word.is_some_and(|word| word.load(Ordering::SeqCst) >> (page % 64) & 1 == 1)
    }

    /// The words that have marks, each with its number, ascending: bit n of word m is page 64 m + n. The marks stay.
    pub fn marked(&self) -> impl Iterator<Item = (usize, u64)> {
        let used = self.used.iter().enumerate();
        used.flat_map(|(group, bits)| set_bits(bits.load(Ordering::SeqCst)).map(move |bit| group * 64 + bit))
            .map(|word| (word, self.words[word].load(Ordering::SeqCst)))
            .filter(|(_, marks)| *marks != 0)
    }

    /// Clears the marks of word number `word` whose bits are set in `mask`. A word past the end has none.
    pub fn clear(&self, word: usize, mask: u64) {
        let (Some(marks), Some(used)) = (self.words.get(word), self.used.get(word / 64)) else {
            return;
        };
        // A load is much cheaper than a locked instruction, and a mark that comes after it stays.
        if marks.load(Ordering::SeqCst) & mask == 0 {
            return;
        }
        let bit = 1 << (word % 64);
        if marks.fetch_and(!mask, Ordering::SeqCst) & !mask == 0 {
            used.fetch_and(!bit, Ordering::SeqCst);
            if marks.load(Ordering::SeqCst) != 0 {
                used.fetch_or(bit, Ordering::SeqCst);
            }
        }
    }

    /// Clears all marks that this call sees.
    pub fn clear_all(&self) {
        self.marked().for_each(|(word, marks)| self.clear(word, marks));
    }

    /// Marks a page. One past the end is none.
    pub fn mark(&self, page: usize) {
        if page < self.pages {
            self.mark_bits(page / 64, 1 << (page % 64));
        }
    }

    fn mark_bits(&self, word: usize, mask: u64) {
        let (Some(marks), Some(used)) = (self.words.get(word), self.used.get(word / 64)) else {
            return;
        };
        let bit = 1 << (word % 64);
        marks.fetch_or(mask, Ordering::SeqCst);
        if used.load(Ordering::SeqCst) & bit == 0 {
            used.fetch_or(bit, Ordering::SeqCst);
        }
    }
}

impl NewBitmap for PageMarks {
    fn with_len(len: usize) -> Self {
        let pages = len.div_ceil(PAGE_SIZE as usize);
        let words = pages.div_ceil(64);
        Self {
            words: zeroed_words(words),
            used: zeroed_words(words.div_ceil(64)),
            pages,
        }
    }
}

impl<'a> WithBitmapSlice<'a> for PageMarks {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for PageMarks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let Some(last) = offset.saturating_add(len).checked_sub(1).filter(|_| len > 0) else {
            return;
        };
        let first = offset / PAGE_SIZE as usize;
        let end = (last / PAGE_SIZE as usize + 1).min(self.pages);
        let mut page = first;
        while page < end {
            let count = (end - page).min(64 - page % 64);
            self.mark_bits(page / 64, (u64::MAX >> (64 - count)) << (page % 64));
            page += count;
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_marked(offset / PAGE_SIZE as usize)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

/// The positions of the bits that are set, ascending.
fn set_bits(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = bits.trailing_zeros() as usize;
        bits &= bits.wrapping_sub(1);
        (bit < 64).then_some(bit)
    })
}

/// So many words of zeroes that the system provides as they are touched. Without that much memory the process ends, as with
/// any vector.
pub fn zeroed_words(count: usize) -> Vec<AtomicU64> {
    AtomicU64::new_vec_zeroed(count).unwrap_or_else(|_| (0..count).map(|_| AtomicU64::new(0)).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;

    fn pages(marks: &PageMarks) -> BTreeSet<usize> {
        let of_word = |(word, bits): (usize, u64)| set_bits(bits).map(move |bit| word * 64 + bit);
        marks.marked().flat_map(of_word).collect()
    }

    fn resident() -> u64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * PAGE_SIZE
    }

    #[test]
    fn a_terabyte_without_marks_is_looked_through_at_once() {
        let before = resident();
        let marks = PageMarks::with_len(1 << 40);
        marks.mark_dirty((1 << 40) - 1, 5);
        marks.mark_dirty(0, 1);
        // What was marked and cleared again is none.
        marks.mark_dirty(1 << 30, 1 << 20);
        (0..4).for_each(|word| marks.clear((1 << 12) + word, u64::MAX));
        let began = Instant::now();
        assert_eq!(pages(&marks), [0, (1 << 28) - 1].into());
        // 32 MiB of words would take some ten milliseconds, and be resident afterwards.
        assert!(
            began.elapsed() < Duration::from_millis(5),
            "{:?}",
            began.elapsed()
        );
        let grown = resident().saturating_sub(before);
        assert!(grown < 4 << 20, "{grown} bytes");
    }

    #[test]
    fn no_mark_is_lost_to_a_thread_that_clears() {
        // One thread marks two pages of one word in turn, each once the other thread has cleared it; what the other one
        // does not find it would wait for in vain.
        let marks = PageMarks::with_len(64 * PAGE_SIZE as usize);
        let began = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for turn in 0..20_000usize {
                    while marks.is_marked(turn % 2) {
                        assert!(
                            began.elapsed() < Duration::from_secs(60),
                            "a mark was never found"
                        );
                        std::hint::spin_loop();
                    }
                    marks.mark(turn % 2);
                }
            });
            let mut found = 0;
            while found < 20_000 {
                assert!(began.elapsed() < Duration::from_secs(60), "found {found} marks");
                for (word, bits) in marks.marked() {
                    marks.clear(word, bits);
                    found += bits.count_ones() as usize;
                }
            }
        });
        assert!(pages(&marks).is_empty());
        assert!(marks.used.iter().all(|used| used.load(Ordering::SeqCst) == 0));
    }

    proptest! {
        #[test]
        fn what_is_marked_is_found_until_it_is_cleared(
            writes in proptest::collection::vec((0usize..600_000, 0usize..80_000), 0..12),
            cleared in proptest::collection::vec((0usize..5, any::<u64>()), 0..6),
        ) {
            // 130 pages and a part of one.
            let marks = PageMarks::with_len((130 << 12) + 1);
            let mut model = BTreeSet::new();
            for (offset, len) in writes {
                marks.mark_dirty(offset, len);
                if len > 0 {
                    model.extend((offset >> 12..=(offset + len - 1) >> 12).filter(|page| *page <= 130));
                }
            }
            prop_assert_eq!(&pages(&marks), &model);
            for (word, mask) in cleared {
                marks.clear(word, mask);
                model.retain(|page| page / 64 != word || mask >> (page % 64) & 1 == 0);
            }
            prop_assert_eq!(&pages(&marks), &model);
            prop_assert!((0..200).all(|page| marks.is_marked(page) == model.contains(&page)));
            prop_assert!((0..200).all(|page| marks.slice_at(page << 12).dirty_at(7) == model.contains(&page)));
        }
    }
}
