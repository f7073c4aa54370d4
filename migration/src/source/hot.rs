//! Finds out, before anything is sent, where the guest writes all the time: round 1 sends that last.
//!
//! Once a page was sent, the guest's next write to it is a fault, and the page has to be sent again. What the guest writes
//! all the time is no use to the destination before the end of the round, and costs the guest least if it is sent then:
//! until then the guest writes to it at full speed.
//!
//! Nothing is left out here: all the pages whose marks are cleared are sent in round 1, or are still unsent when it ends.

use std::thread;
use std::time::Duration;

use migration_io::PAGE_SIZE;

use super::MigrateError;
use super::space::Space;
use crate::page_set::PageSet;

/// Fewer pages than this are sent in little more time than it takes to find out.
const MIN_PAGES: u64 = (1 << 30) / PAGE_SIZE;
/// Words of the bitmap from one page that is looked at to the next: 128 MiB. Each costs the guest some milliseconds if it is
/// hot and was mapped as a part of a huge page, because KVM then maps all of that anew, page by page.
const CELL_WORDS: usize = 512;
/// When the guest has not written to any of these pages after the first time, it is left alone. It has the second time to
/// write to all that are hot, and the third one to do so again: a guest that goes through its memory once in a while does
/// not come back so soon.
const FIRST_LOOK: Duration = Duration::from_millis(5);
const SECOND_LOOK: Duration = Duration::from_millis(15);
const THIRD_LOOK: Duration = Duration::from_millis(10);
/// Where less than this part (one in so many) of all pages is cold, it makes no difference which come last.
const MIN_COLD_PART: u64 = 8;

/// What the guest writes all the time.
pub(super) struct HotPages {
    /// Pages that round 1 sends last: every cell of memory that has a hot page at one of its ends.
    pub(super) put_off: PageSet,
    /// How many bytes are hot: those of the cells whose first page is.
    pub(super) bytes: u64,
}

/// A cell of memory and the first of its pages.
#[derive(Clone, Copy, Debug)]
struct Cell {
    region: usize,
    word: usize,
    probe: u64,
}

/// Those of `pages`, the pages of round 1, that the guest writes all the time; none where it makes no difference.
pub(super) fn hot_pages(space: &Space<'_>, pages: &PageSet) -> Result<HotPages, MigrateError> {
    let mut put_off = space.none()?;
    let cells = if pages.len() < MIN_PAGES {
        Vec::new()
    } else {
        cells(pages)
    };
    let is_hot = written_again(space, &cells)?;
    let mut bytes = 0;
    for (at, cell) in cells.iter().enumerate() {
        let next = cells.get(at + 1).zip(is_hot.get(at + 1));
        let next_is_hot = next.is_some_and(|(next, hot)| *hot && cell.touches(next));
        if is_hot[at] {
            bytes += pages.count(cell.region, cell.word, CELL_WORDS) * PAGE_SIZE;
        }
        if is_hot[at] || next_is_hot {
            put_off.insert_part(pages, cell.region, cell.word, CELL_WORDS);
        }
    }
    tracing::debug!(cells = cells.len(), bytes, put_off = put_off.len(), "hot pages");
    if (pages.len() - put_off.len()) * MIN_COLD_PART < pages.len() {
        put_off.clear();
        bytes = 0;
    }
    Ok(HotPages { put_off, bytes })
}

impl Cell {
    /// Whether the other cell begins where this one ends.
    fn touches(&self, next: &Cell) -> bool {
        next.region == self.region && next.word == self.word + CELL_WORDS
    }
}

/// Of which cells the guest writes the first page all the time.
fn written_again(space: &Space<'_>, cells: &[Cell]) -> Result<Vec<bool>, MigrateError> {
    if cells.is_empty() {
        return Ok(Vec::new());
    }
    let look = |after: Duration, cleared: &[bool]| -> Result<Vec<bool>, MigrateError> {
        thread::sleep(after);
        let mut marked = space.none()?;
        space.peek(&mut marked)?;
        let written = cells.iter().zip(cleared);
        Ok(written
            .map(|(cell, cleared)| *cleared && marked.contains(cell.probe))
            .collect())
    };
    let clear = |wanted: &[bool]| -> Result<(), MigrateError> {
        let mut probes = space.none()?;
        for (cell, _) in cells.iter().zip(wanted).filter(|(_, wanted)| **wanted) {
            probes.insert_gpa(cell.probe)?;
        }
        space.clear_all(&probes)
    };
    let all = vec![true; cells.len()];
    clear(&all)?;
    let written = look(FIRST_LOOK, &all)?;
    if !written.contains(&true) {
        return Ok(written);
    }
    let written = look(SECOND_LOOK, &all)?;
    clear(&written)?;
    look(THIRD_LOOK, &written)
}

/// All cells that have pages in a set, ascending.
fn cells(pages: &PageSet) -> Vec<Cell> {
    let mut cells = Vec::new();
    for (region, from, words) in pages.filled() {
        let Some(gpa) = pages.region_gpa(region) else {
            continue;
        };
        for (word, words) in (from..).step_by(CELL_WORDS).zip(words.chunks(CELL_WORDS)) {
            let filled = words.iter().position(|bits| *bits != 0);
            cells.extend(filled.map(|at| {
                let page = (word + at) as u64 * 64 + u64::from(words[at].trailing_zeros());
                let probe = gpa + page * PAGE_SIZE;
                Cell { region, word, probe }
            }));
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use migration_io::{GuestMemory, MemoryRange};
    use vm_memory::GuestAddress;

    use super::*;
    use crate::ports::{DirtyLog, MemoryRegion, PortError};

    const MIB: u64 = 1 << 20;

    /// A guest that writes to every page of a range whose mark was cleared, until the log has been looked at so many times.
    struct WritingGuest {
        hot: MemoryRange,
        until: u32,
        state: Mutex<(PageSet, u32)>,
    }

    impl DirtyLog for WritingGuest {
        fn peek(&self, into: &mut PageSet) -> Result<(), PortError> {
            let mut state = self.state.lock().unwrap();
            state.1 += 1;
            if state.1 <= self.until {
                let cleared = state.0.ranges(PAGE_SIZE);
                let hot = self.hot.gpa..self.hot.gpa + self.hot.len;
                for range in cleared.filter(|range| hot.contains(&range.gpa)) {
                    into.insert_range(range)?;
                }
            }
            Ok(())
        }

        fn clear(&self, region: usize, first: u64, words: &[u64]) -> Result<(), PortError> {
            let mut state = self.state.lock().unwrap();
            Ok(state.0.insert_words(region, (first / 64) as usize, words)?)
        }

        fn by_vcpu(&self) -> Vec<u64> {
            Vec::new()
        }
    }

    /// What is found of 2 GiB whose first page the guest has never touched, and how often the log was looked at.
    fn found(hot: MemoryRange, until: u32, len: u64) -> (HotPages, u32) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), (1 << 20) as usize)]).unwrap();
        let region = MemoryRegion { gpa: 0, len };
        let space = Space::new(vec![region], &memory, Vec::new()).unwrap();
        let guest = Arc::new(WritingGuest {
            hot,
            until,
            state: Mutex::new((space.none().unwrap(), 0)),
        });
        space.set_log(guest.clone());
        let mut pages = space.none().unwrap();
        let used = MemoryRange {
            gpa: PAGE_SIZE,
            len: len - PAGE_SIZE,
        };
        pages.insert_range(used).unwrap();
        let found = hot_pages(&space, &pages).unwrap();
        let peeks = guest.state.lock().unwrap().1;
        (found, peeks)
    }

    fn range(from: u64, to: u64) -> MemoryRange {
        MemoryRange {
            gpa: from * MIB,
            len: (to - from) * MIB,
        }
    }

    #[test]
    fn every_cell_that_touches_what_is_written_all_the_time_is_put_off() {
        let (found, peeks) = found(range(500, 1000), u32::MAX, 2048 * MIB);
        let put_off: Vec<MemoryRange> = found.put_off.ranges(u64::MAX).collect();
        assert_eq!(put_off, [range(384, 1024)]);
        // Four cells begin in it.
        assert_eq!((found.bytes, peeks), (4 * 128 * MIB, 3));
    }

    #[test]
    fn a_guest_that_rests_is_looked_at_once_and_a_small_one_not_at_all() {
        let (found_none, peeks) = found(range(500, 1000), 0, 2048 * MIB);
        assert_eq!((found_none.put_off.len(), found_none.bytes, peeks), (0, 0, 1));
        let (found_none, peeks) = found(range(0, 512), u32::MAX, 1024 * MIB);
        assert_eq!((found_none.put_off.len(), found_none.bytes, peeks), (0, 0, 0));
    }

    #[test]
    fn what_is_not_written_again_is_not_hot() {
        let (found, peeks) = found(range(500, 1000), 2, 2048 * MIB);
        assert_eq!((found.put_off.len(), found.bytes, peeks), (0, 0, 3));
    }

    #[test]
    fn a_guest_that_writes_everywhere_has_no_pages_to_put_off() {
        let (found, _) = found(range(0, 1900), u32::MAX, 2048 * MIB);
        assert_eq!((found.put_off.len(), found.bytes), (0, 0));
    }
}
