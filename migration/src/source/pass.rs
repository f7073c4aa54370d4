//! One pass over a set of pages: cuts it into chunks and hands each out once, to the streams that send them. Knows
//! neither memory nor connections.

use std::sync::{Mutex, MutexGuard, PoisonError};

use migration_io::{MemoryRange, PAGE_SIZE};

use crate::page_set::PageSet;
use crate::protocol::Span;

/// A stretch of a region, and which of its pages are to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Number of the region.
    pub(super) region: usize,
    /// The stretch's first page, counted from the region's first; a multiple of 64.
    pub(super) first: u64,
    /// Guest-physical address of that page.
    pub(super) gpa: u64,
    /// Bit n of word m is page `first + 64 m + n`.
    pub(super) words: Vec<u64>,
}

/// Pages of a round on their way; each is handed out once.
#[derive(Debug)]
pub(super) struct Pass {
    route: Route,
    cursor: Mutex<Cursor>,
}

/// How far a pass is.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    /// The next stretch.
    next: usize,
    /// Pages of the stretches from there on.
    unsent: u64,
    stopped: bool,
}

/// In which order a pass goes over memory.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order<'a> {
    /// As the addresses are.
    Ascending,
    /// All over memory, evenly: a guest that sweeps its memory then writes sent and unsent pages alike, and
    /// shows early how much it dirties. Those of the pages given here that are to be sent come last, in the same way.
    Scattered(&'a PageSet),
}

/// The pages in the order in which a pass will send them.
pub(super) fn spans_in_order(pages: &PageSet, streams: usize, order: Order<'_>) -> Vec<Span> {
    let route = Route::new(pages.clone(), streams, order);
    let mut spans: Vec<Span> = Vec::new();
    for stretch in &route.stretches {
        let pages = route.pages(stretch);
        let Some(gpa) = pages.region_gpa(stretch.region) else {
            continue;
        };
        let from = spans.len();
        let words = pages.words(stretch.region, stretch.word, stretch.count);
        for (word, bits) in (stretch.word..).zip(words) {
            for range in runs(gpa + word as u64 * 64 * PAGE_SIZE, bits) {
                match spans[from..].last_mut() {
                    Some(last) if last.gpa + last.len == range.gpa => last.len += range.len,
                    _ => spans.push(range.into()),
                }
            }
        }
    }
    spans
}

/// What the chunks of a pass will be, in the order in which they are handed out.
#[derive(Debug)]
struct Route {
    first: PageSet,
    put_off: PageSet,
    stretches: Vec<ChunkWords>,
    /// From which stretch on the pages are put off.
    put_off_from: usize,
}

/// Words of a region's bitmap that make one chunk, and the pages in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ChunkWords {
    region: usize,
    word: usize,
    count: usize,
    pages: u64,
    put_off: bool,
}

/// Most pages in a chunk: more would only delay the reading of what was cleared.
const MAX_CHUNK_PAGES: u64 = 1024;
/// Fewest pages in a chunk, where there are as many: fewer are not worth a system call to clear their marks.
const MIN_CHUNK_PAGES: u64 = 64;
/// Most words in a chunk, however few pages they name: bounds the call that clears them.
const MAX_CHUNK_WORDS: usize = 1024;
/// Chunks for each stream, so that a slow stream does not hold up the pass.
const CHUNKS_PER_STREAM: u64 = 8;

impl Pass {
    /// A pass over `pages` by so many streams.
    pub(super) fn new(pages: PageSet, streams: usize, order: Order<'_>) -> Self {
        let unsent = pages.len();
        Self {
            route: Route::new(pages, streams, order),
            cursor: Mutex::new(Cursor {
                next: 0,
                unsent,
                stopped: false,
            }),
        }
    }

    /// The next chunk; `None` at the end, or after [`Pass::stop`].
    pub(super) fn next(&self) -> Option<Chunk> {
        let stretch = {
            let mut cursor = self.lock();
            if cursor.stopped {
                return None;
            }
            let stretch = self.route.stretches.get(cursor.next)?;
            cursor.next += 1;
            cursor.unsent -= stretch.pages;
            stretch
        };
        let first = stretch.word as u64 * 64;
        let pages = self.route.pages(stretch);
        Some(Chunk {
            region: stretch.region,
            first,
            gpa: pages.region_gpa(stretch.region)? + first * PAGE_SIZE,
            words: pages.words(stretch.region, stretch.word, stretch.count),
        })
    }

    /// Whether everything was handed out, or nothing more is.
    pub(super) fn is_over(&self) -> bool {
        let cursor = self.lock();
        cursor.stopped || cursor.next == self.route.stretches.len()
    }

    /// Hands out nothing more.
    pub(super) fn stop(&self) {
        self.lock().stopped = true;
    }

    /// Pages that were not handed out, and those of them that are put off to the end.
    pub(super) fn unsent(&self) -> (u64, u64) {
        let Cursor { next, unsent, .. } = *self.lock();
        let put_off = &self.route.stretches[next.max(self.route.put_off_from)..];
        (unsent, put_off.iter().map(|stretch| stretch.pages).sum())
    }

    /// Adds the pages that were not handed out to a set over the same regions.
    pub(super) fn add_unsent(&self, to: &mut PageSet) {
        let next = self.lock().next;
        for stretch in &self.route.stretches[next..] {
            to.insert_part(
                self.route.pages(stretch),
                stretch.region,
                stretch.word,
                stretch.count,
            );
        }
    }

    fn lock(&self) -> MutexGuard<'_, Cursor> {
        // A cursor is a few numbers, whole at any time.
        self.cursor.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Route {
    fn new(pages: PageSet, streams: usize, order: Order<'_>) -> Self {
        let chunk_pages = pages.len() / (streams.max(1) as u64 * CHUNKS_PER_STREAM);
        let chunk_pages = chunk_pages.clamp(MIN_CHUNK_PAGES, MAX_CHUNK_PAGES);
        let mut first = pages;
        let put_off = match order {
            Order::Scattered(last) if !last.is_empty() => {
                let mut put_off = first.clone();
                first.subtract(last);
                put_off.subtract(&first);
                put_off
            }
            Order::Scattered(_) | Order::Ascending => first.split_off(0),
        };
        let mut stretches = [
            stretches(&first, chunk_pages, false),
            stretches(&put_off, chunk_pages, true),
        ];
        if let Order::Scattered(_) = order {
            stretches = stretches.map(|stretches| scattered(&stretches));
        }
        Self {
            put_off_from: stretches[0].len(),
            stretches: stretches.concat(),
            first,
            put_off,
        }
    }

    /// The set that a stretch is part of.
    fn pages(&self, stretch: &ChunkWords) -> &PageSet {
        if stretch.put_off {
            &self.put_off
        } else {
            &self.first
        }
    }
}

/// Cuts a set into stretches of about so many pages.
fn stretches(pages: &PageSet, chunk_pages: u64, put_off: bool) -> Vec<ChunkWords> {
    let mut found: Vec<ChunkWords> = Vec::new();
    let mut open: Option<ChunkWords> = None;
    for (region, from, words) in pages.filled() {
        for (at, word) in (from..).zip(words).filter(|(_, word)| **word != 0) {
            let count = u64::from(word.count_ones());
            match &mut open {
                Some(stretch)
                    if stretch.region == region
                        && stretch.pages < chunk_pages
                        && at - stretch.word < MAX_CHUNK_WORDS =>
                {
                    stretch.count = at + 1 - stretch.word;
                    stretch.pages += count;
                }
                _ => found.extend(open.replace(ChunkWords {
                    region,
                    word: at,
                    count: 1,
                    pages: count,
                    put_off,
                })),
            }
        }
    }
    found.extend(open);
    found
}

/// Every stretch once, neighbours far apart: steps of the golden section spread most evenly.
fn scattered(stretches: &[ChunkWords]) -> Vec<ChunkWords> {
    const GOLDEN_SECTION: f64 = 0.618_033_988_749_895;
    let len = stretches.len();
    let mut step = ((len as f64 * GOLDEN_SECTION) as usize).max(1);
    while gcd(step, len) > 1 {
        step += 1;
    }
    (0..len).map(|index| stretches[(index * step) % len]).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Chunk {
    /// The pages of one word: the address of the first of its 64 and the bits.
    pub(super) fn groups(&self) -> impl Iterator<Item = (u64, u64)> {
        let gpas = (self.gpa..).step_by(64 * PAGE_SIZE as usize);
        gpas.zip(self.words.iter().copied())
            .filter(|(_, bits)| *bits != 0)
    }

    /// Pages in it.
    #[cfg(test)]
    pub(super) fn pages(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// The runs of set bits as ranges from `gpa` on, ascending.
pub(super) fn runs(gpa: u64, mut bits: u64) -> impl Iterator<Item = MemoryRange> {
    let mut at = 0u64;
    std::iter::from_fn(move || {
        if bits == 0 {
            return None;
        }
        let gap = u64::from(bits.trailing_zeros());
        bits >>= gap;
        let run = u64::from(bits.trailing_ones());
        let range = MemoryRange {
            gpa: gpa + (at + gap) * PAGE_SIZE,
            len: run * PAGE_SIZE,
        };
        at += gap + run;
        bits = bits.checked_shr(run as u32).unwrap_or(0);
        Some(range)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ports::MemoryRegion;

    fn set(pages: u64) -> PageSet {
        let region = |gpa, pages| MemoryRegion {
            gpa,
            len: pages * PAGE_SIZE,
        };
        PageSet::new(&[region(0, pages), region(1 << 32, 100)]).unwrap()
    }

    fn collect(pass: &Pass) -> PageSet {
        let mut seen = set(5000);
        while let Some(chunk) = pass.next() {
            assert!(chunk.first.is_multiple_of(64) && chunk.pages() > 0);
            for (gpa, bits) in chunk.groups() {
                for range in runs(gpa, bits) {
                    for page in (range.gpa..range.gpa + range.len).step_by(4096) {
                        assert!(!seen.contains(page), "handed out twice");
                        seen.insert_gpa(page).unwrap();
                    }
                }
            }
        }
        seen
    }

    #[test]
    fn runs_are_found_in_a_word() {
        let found = |bits| {
            runs(0, bits)
                .map(|range| (range.gpa >> 12, range.pages()))
                .collect::<Vec<_>>()
        };
        assert_eq!(found(0), []);
        assert_eq!(found(u64::MAX), [(0, 64)]);
        assert_eq!(found(1 << 63 | 0b1101), [(0, 1), (2, 2), (63, 1)]);
    }

    #[test]
    fn an_empty_set_is_no_work() {
        assert_eq!(Pass::new(set(5000), 4, Order::Ascending).next(), None);
    }

    proptest! {
        #[test]
        fn every_page_is_handed_out_once(
            pages in proptest::collection::vec((0u64..5000, 1u64..200), 0..40),
            high in proptest::collection::vec(0u64..100, 0..10),
            streams in 1usize..5,
            taken in 0usize..4,
            scatter in proptest::option::of(proptest::collection::vec(0u64..78, 0..40)),
        ) {
            let (mut all, mut put_off) = (set(5000), set(5000));
            for (page, count) in pages {
                for page in page..(page + count).min(5000) {
                    all.insert_gpa(page << 12).unwrap();
                }
            }
            for word in scatter.iter().flatten() {
                put_off.insert_range(MemoryRange { gpa: word << 18, len: 1 << 18 }).unwrap();
            }
            let order = scatter.as_ref().map_or(Order::Ascending, |_| Order::Scattered(&put_off));
            for page in high {
                all.insert_gpa((1 << 32) + (page << 12)).unwrap();
            }
            let pass = Pass::new(all.clone(), streams, order);
            prop_assert_eq!(pass.unsent().0, all.len());

            // The map that the destination gets names the same pages in the same order.
            let announced: Vec<u64> = spans_in_order(&all, streams, order)
                .iter()
                .flat_map(|span| (span.gpa..span.gpa + span.len).step_by(4096))
                .collect();
            let twin = Pass::new(all.clone(), streams, order);
            let chunks = std::iter::from_fn(|| twin.next());
            let groups = chunks.flat_map(|chunk| chunk.groups().collect::<Vec<_>>());
            let sent: Vec<u64> = groups
                .flat_map(|(gpa, bits)| runs(gpa, bits))
                .flat_map(|range| (range.gpa..range.gpa + range.len).step_by(4096))
                .collect();
            // What is put off comes last.
            let last = sent.iter().skip_while(|gpa| !put_off.contains(**gpa));
            prop_assert!(scatter.is_none() || last.clone().all(|gpa| put_off.contains(*gpa)));
            if scatter.is_some() {
                prop_assert_eq!(Pass::new(all.clone(), streams, order).unsent().1, last.count() as u64);
            }
            prop_assert_eq!(announced, sent);
            prop_assert_eq!(&collect(&pass), &all);
            prop_assert_eq!(pass.unsent(), (0, 0));

            // What a pass that was stopped handed out and what it did not are everything.
            let pass = Pass::new(all.clone(), streams, order);
            let mut handed_out = 0;
            for _ in 0..taken {
                handed_out += pass.next().map_or(0, |chunk| chunk.pages());
            }
            pass.stop();
            prop_assert_eq!(pass.next(), None);
            let mut rest = set(5000);
            pass.add_unsent(&mut rest);
            prop_assert_eq!(rest.len(), pass.unsent().0);
            prop_assert_eq!(rest.len() + handed_out, all.len());
            rest.union(&all).unwrap();
            prop_assert_eq!(rest, all);
        }
    }
}
