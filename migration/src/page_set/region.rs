//! The pages of one region that are in a set: leaves of 128 MiB, of which only those take memory that have some of their
//! pages in the set and some not.

use super::masks;

/// Words of a leaf: 4 KiB, for 128 MiB of guest memory.
const LEAF_WORDS: usize = 512;
const LEAF_PAGES: u64 = 64 * LEAF_WORDS as u64;

static ALL: [u64; LEAF_WORDS] = [u64::MAX; LEAF_WORDS];
static NONE: [u64; LEAF_WORDS] = [0; LEAF_WORDS];

/// The pages of one region.
#[derive(Clone, Debug)]
pub(super) struct RegionPages {
    gpa: u64,
    pages: u64,
    leaves: Vec<Leaf>,
}

/// A part of the region. One that is not whole, at the region's end, is never `Full`.
#[derive(Clone, Debug)]
enum Leaf {
    Empty,
    Full,
    Mixed(Box<[u64; LEAF_WORDS]>),
}

impl RegionPages {
    /// No pages of a region of so many.
    pub(super) fn new(gpa: u64, pages: u64) -> Self {
        let leaves = pages.div_ceil(LEAF_PAGES) as usize;
        Self {
            gpa,
            pages,
            leaves: vec![Leaf::Empty; leaves],
        }
    }

    /// First guest-physical address of the region.
    pub(super) fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Pages of the region, in the set or not.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Words of a bitmap of the region.
    pub(super) fn words(&self) -> usize {
        self.pages.div_ceil(64) as usize
    }

    /// Adds the pages from `first` up to `end`, which the region has.
    pub(super) fn insert(&mut self, first: u64, end: u64) {
        let mut page = first;
        while page < end {
            let (leaf, start) = ((page / LEAF_PAGES) as usize, page - page % LEAF_PAGES);
            let until = end.min(start + LEAF_PAGES);
            if until - page == LEAF_PAGES {
                self.leaves[leaf] = Leaf::Full;
            } else {
                let words = self.leaves[leaf].words_mut();
                masks(page - start, until - start).for_each(|(word, mask)| words[word] |= mask);
            }
            page = until;
        }
    }

    /// Adds the pages of a part of the region's bitmap, which the region has.
    pub(super) fn insert_words(&mut self, from: usize, words: &[u64]) {
        let mut at = from;
        let mut rest = words;
        while !rest.is_empty() {
            let (leaf, within) = (at / LEAF_WORDS, at % LEAF_WORDS);
            let (part, more) = rest.split_at(rest.len().min(LEAF_WORDS - within));
            self.leaves[leaf].insert_words(within, part);
            (at, rest) = (at + part.len(), more);
        }
    }

    /// The parts of the bitmap that are not empty, with the number of the first word.
    pub(super) fn filled(&self) -> impl Iterator<Item = (usize, &[u64])> {
        self.parts(0, self.words())
    }

    /// The same of `count` words from word `from` on.
    pub(super) fn parts(&self, from: usize, count: usize) -> impl Iterator<Item = (usize, &[u64])> {
        let end = from.saturating_add(count).min(self.words());
        let leaves = if from < end {
            from / LEAF_WORDS..end.div_ceil(LEAF_WORDS)
        } else {
            0..0
        };
        leaves.filter_map(move |leaf| {
            let start = leaf * LEAF_WORDS;
            let words = match &self.leaves[leaf] {
                Leaf::Empty => return None,
                leaf => leaf.words(),
            };
            let first = from.max(start);
            Some((first, &words[first - start..end.min(start + LEAF_WORDS) - start]))
        })
    }

    /// Takes the first pages out, until `left` of them are taken.
    pub(super) fn split_off(&mut self, left: &mut u64) -> Self {
        let mut taken = Self::new(self.gpa, self.pages);
        for (leaf, taken) in self.leaves.iter_mut().zip(&mut taken.leaves) {
            if *left == 0 {
                break;
            }
            let count = leaf.len();
            if count <= *left {
                *taken = std::mem::replace(leaf, Leaf::Empty);
                *left -= count;
                continue;
            }
            for (word, taken) in leaf.words_mut().iter_mut().zip(taken.words_mut()) {
                if *left == 0 {
                    break;
                }
                *left = left.saturating_sub(u64::from(word.count_ones()));
                *taken = std::mem::take(word);
            }
        }
        taken
    }

    /// Turns the pages into all others of the region.
    pub(super) fn invert(&mut self) {
        for leaf in &mut self.leaves {
            match leaf {
                Leaf::Empty => *leaf = Leaf::Full,
                Leaf::Full => *leaf = Leaf::Empty,
                Leaf::Mixed(words) => words.iter_mut().for_each(|word| *word = !*word),
            }
        }
        let beyond = self.pages % LEAF_PAGES;
        if let (Some(last), 1..) = (self.leaves.last_mut(), beyond) {
            let words = last.words_mut();
            masks(beyond, LEAF_PAGES).for_each(|(word, mask)| words[word] &= !mask);
        }
    }

    /// Adds the pages of the same region in another set.
    pub(super) fn union(&mut self, other: &Self) {
        for (leaf, more) in self.leaves.iter_mut().zip(&other.leaves) {
            match (&mut *leaf, more) {
                (_, Leaf::Empty) | (Leaf::Full, _) => {}
                (Leaf::Empty, _) | (_, Leaf::Full) => *leaf = more.clone(),
                (Leaf::Mixed(words), Leaf::Mixed(more)) => {
                    words
                        .iter_mut()
                        .zip(&**more)
                        .for_each(|(word, more)| *word |= more);
                }
            }
        }
    }

    /// Removes the pages of another set's region from the same leaf on: what is beyond either's end stays.
    pub(super) fn subtract(&mut self, other: &Self) {
        for (leaf, less) in self.leaves.iter_mut().zip(&other.leaves) {
            match (&mut *leaf, less) {
                (Leaf::Empty, _) | (_, Leaf::Empty) => {}
                (_, Leaf::Full) => *leaf = Leaf::Empty,
                (_, Leaf::Mixed(less)) => {
                    let words = leaf.words_mut();
                    words
                        .iter_mut()
                        .zip(&**less)
                        .for_each(|(word, less)| *word &= !less);
                    if words.iter().all(|word| *word == 0) {
                        *leaf = Leaf::Empty;
                    }
                }
            }
        }
    }

    /// Whether the set has a page, which the region has.
    pub(super) fn contains(&self, page: u64) -> bool {
        let word = &self.leaves[(page / LEAF_PAGES) as usize].words()[(page % LEAF_PAGES / 64) as usize];
        word >> (page % 64) & 1 == 1
    }

    /// Number of pages in the set.
    pub(super) fn len(&self) -> u64 {
        self.leaves.iter().map(Leaf::len).sum()
    }

    /// Whether the set has none of the region's pages.
    pub(super) fn is_empty(&self) -> bool {
        self.leaves.iter().all(|leaf| match leaf {
            Leaf::Empty => true,
            Leaf::Full => false,
            Leaf::Mixed(words) => words.iter().all(|word| *word == 0),
        })
    }

    /// The first page from `from` on that is in the set (or, with `wanted` false, is not).
    pub(super) fn next(&self, from: u64, wanted: bool) -> Option<u64> {
        let flip = if wanted { 0 } else { u64::MAX };
        let mut page = from;
        for leaf in self.leaves.get((from / LEAF_PAGES) as usize..)? {
            let start = page - page % LEAF_PAGES;
            let found = match (leaf, wanted) {
                (Leaf::Full, true) | (Leaf::Empty, false) => Some(page),
                (Leaf::Full, false) | (Leaf::Empty, true) => None,
                (Leaf::Mixed(words), _) => next_in(words, page - start, flip).map(|page| start + page),
            };
            if let Some(found) = found {
                return Some(found).filter(|page| *page < self.pages);
            }
            page = start + LEAF_PAGES;
        }
        None
    }
}

/// The first bit from `from` on that is set in the words with `flip` applied.
fn next_in(words: &[u64; LEAF_WORDS], from: u64, flip: u64) -> Option<u64> {
    let mut at = (from / 64) as usize;
    let mut word = (words.get(at)? ^ flip) & (u64::MAX << (from % 64));
    while word == 0 {
        at += 1;
        word = words.get(at)? ^ flip;
    }
    Some(at as u64 * 64 + u64::from(word.trailing_zeros()))
}

/// By their pages: a leaf whose words are all zero is an empty one.
impl PartialEq for RegionPages {
    fn eq(&self, other: &Self) -> bool {
        let leaves = self.leaves.iter().zip(&other.leaves);
        (self.gpa, self.pages) == (other.gpa, other.pages)
            && leaves.into_iter().all(|(a, b)| a.words() == b.words())
    }
}

impl Eq for RegionPages {}

impl Leaf {
    fn words(&self) -> &[u64; LEAF_WORDS] {
        match self {
            Self::Empty => &NONE,
            Self::Full => &ALL,
            Self::Mixed(words) => words,
        }
    }

    /// Words to be changed.
    fn words_mut(&mut self) -> &mut [u64; LEAF_WORDS] {
        if !matches!(self, Self::Mixed(_)) {
            *self = Self::Mixed(Box::new(*self.words()));
        }
        match self {
            Self::Mixed(words) => words,
            // Made so just above.
            Self::Empty | Self::Full => unreachable!("a leaf with words"),
        }
    }

    fn insert_words(&mut self, from: usize, more: &[u64]) {
        if matches!(self, Self::Full) || more.iter().all(|word| *word == 0) {
            return;
        }
        if more.len() == LEAF_WORDS && more.iter().all(|word| *word == u64::MAX) {
            *self = Self::Full;
            return;
        }
        let words = self.words_mut().iter_mut().skip(from);
        words.zip(more).for_each(|(word, more)| *word |= more);
    }

    fn len(&self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Full => LEAF_PAGES,
            Self::Mixed(words) => words.iter().map(|word| u64::from(word.count_ones())).sum(),
        }
    }
}
