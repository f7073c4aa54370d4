//! Finds which pages of guest memory were ever touched, by the page map and by holes in files. All others are zero.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use devices::GuestMemory;
use migration::{MemoryRange, PageSet};
use rustix::fs::SeekFrom;
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion};

use super::MemoryError;
use super::mapping::shared_file;
use super::marks::{RamRegion, pages};
use crate::memory::PAGE_SIZE;

/// Entries of `/proc/self/pagemap` that are read at once: for 256 MiB of memory.
const ENTRIES: usize = 1 << 16;
/// Bytes of an entry.
const ENTRY: usize = 8;
/// An entry's bits for "in memory" and "swapped out" (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;
/// An entry's bit for "a file's page, or anonymous memory that is shared".
const OF_FILE: u64 = 1 << 61;

/// An entry's bit for "protected against writes by a userfaultfd".
const PROTECTED: u64 = 1 << 57;

/// This process's page map, which is opened once: see [`open_page_map`].
static PAGE_MAP: OnceLock<File> = OnceLock::new();

/// Opens the page map for all later calls: the process may not be allowed to open it any more by then.
pub fn open_page_map() -> Result<(), MemoryError> {
    page_map().map(drop).map_err(MemoryError::Pagemap)
}

fn page_map() -> io::Result<&'static File> {
    if let Some(file) = PAGE_MAP.get() {
        return Ok(file);
    }
    let file = File::open("/proc/self/pagemap")?;
    Ok(PAGE_MAP.get_or_init(|| file))
}

/// Adds every page that may hold something to `into`. `replaced` are addresses and lengths, ascending, of memory that was
/// given up: there the content of a file that is mapped privately does not count.
pub fn populated(
    memory: &GuestMemory,
    replaced: &[(u64, u64)],
    into: &mut PageSet,
) -> Result<(), MemoryError> {
    let mut pagemap = None;
    for (index, region) in memory.iter().enumerate() {
        if let Some(file) = region.file_offset() {
            // The file's own map: this process need not have touched what another one wrote.
            in_file(file, region, replaced, into)?;
        }
        if shared_file(region).is_some() {
            continue;
        }
        let pagemap = match &mut pagemap {
            Some(pagemap) => pagemap,
            none => none.insert(Pagemap::open().map_err(MemoryError::Pagemap)?),
        };
        let words = pagemap.find(region, in_use).map_err(MemoryError::Pagemap)?;
        into.insert_bitmap(index, &words)?;
    }
    Ok(())
}

/// Adds every page of privately mapped memory that this process has a copy of its own of, because it was written to: its
/// content may differ from the file's.
pub fn private_copies(memory: &GuestMemory, into: &mut PageSet) -> Result<(), MemoryError> {
    let mut pagemap = Pagemap::open().map_err(MemoryError::Pagemap)?;
    for (index, region) in memory.iter().enumerate() {
        let words = pagemap.find(region, is_own).map_err(MemoryError::Pagemap)?;
        into.insert_bitmap(index, &words)?;
    }
    Ok(())
}

/// Whether a page is there.
fn in_use(entry: u64) -> bool {
    entry & PRESENT_OR_SWAPPED != 0
}

/// Whether a page is there that is this process's own and not a file's.
fn is_own(entry: u64) -> bool {
    in_use(entry) && entry & OF_FILE == 0
}

/// Finds pages that are protected against writes; see [`super::Userfault::protect`].
#[derive(Debug)]
pub struct ProtectedPages(Pagemap);

impl ProtectedPages {
    /// Opens the page map.
    pub fn open() -> Result<Self, MemoryError> {
        Ok(Self(Pagemap::open().map_err(MemoryError::Pagemap)?))
    }

    /// A bit for each of so many pages from the region's page `first` on that was there when it was protected, and is
    /// still protected: it has not changed since.
    pub fn find(&mut self, region: &RamRegion, first: u64, count: u64) -> Result<Vec<u64>, MemoryError> {
        let protected = |entry| in_use(entry) && entry & PROTECTED != 0;
        self.0
            .find_in(region, first, count, protected)
            .map_err(MemoryError::Pagemap)
    }
}

/// The page map, with room for the entries of one read.
#[derive(Debug)]
struct Pagemap {
    file: &'static File,
    buffer: Vec<u8>,
}

impl Pagemap {
    fn open() -> io::Result<Self> {
        Ok(Self {
            file: page_map()?,
            buffer: vec![0; ENTRIES * ENTRY],
        })
    }

    /// A bit for each page of a region whose entry is `wanted`. All pages of a huge page are alike.
    fn find(&mut self, region: &RamRegion, wanted: fn(u64) -> bool) -> io::Result<Vec<u64>> {
        self.find_in(region, 0, pages(region), wanted)
    }

    /// The same of so many pages from the region's page `first` on.
    fn find_in(
        &mut self,
        region: &RamRegion,
        first: u64,
        count: u64,
        wanted: fn(u64) -> bool,
    ) -> io::Result<Vec<u64>> {
        let total = count as usize;
        let first = region.as_ptr() as u64 / PAGE_SIZE + first;
        let mut words = Vec::with_capacity(total.div_ceil(64));
        for done in (0..total).step_by(ENTRIES) {
            let bytes = &mut self.buffer[..ENTRIES.min(total - done) * ENTRY];
            self.file
                .read_exact_at(bytes, (first + done as u64) * ENTRY as u64)?;
            words.extend(bytes.chunks(64 * ENTRY).map(|entries| word(entries, wanted)));
        }
        Ok(words)
    }
}

/// The bits of at most 64 entries.
fn word(entries: &[u8], wanted: fn(u64) -> bool) -> u64 {
    let (entries, _) = entries.as_chunks::<ENTRY>();
    entries.iter().enumerate().fold(0, |word, (bit, entry)| {
        word | u64::from(wanted(u64::from_ne_bytes(*entry))) << bit
    })
}

/// Fails if a file that memory is mapped from has become shorter than that.
pub fn check_whole(memory: &GuestMemory) -> Result<(), MemoryError> {
    let mapped = memory
        .iter()
        .filter_map(|region| Some((region.file_offset()?, region.len())));
    mapped
        .into_iter()
        .try_for_each(|(file, len)| check_len(file, len))
}

/// Pages that are missing at a file's end are no hole: their content is lost.
fn check_len(file: &FileOffset, len: u64) -> Result<(), MemoryError> {
    let (expected, got) = (
        file.start() + len,
        file.file().metadata().map_err(MemoryError::Seek)?.len(),
    );
    if got < expected {
        return Err(MemoryError::Shrunk { expected, got });
    }
    Ok(())
}

/// Adds what is in the file behind a region: all but its holes.
fn in_file(
    file: &FileOffset,
    region: &RamRegion,
    replaced: &[(u64, u64)],
    into: &mut PageSet,
) -> Result<(), MemoryError> {
    let start = file.start();
    check_len(file, region.len())?;
    let seek = |to| match rustix::fs::seek(file.file(), to) {
        Ok(at) => Ok(Some(at.saturating_sub(start).min(region.len()))),
        // Nothing but a hole up to the end.
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(MemoryError::Seek(error.into())),
    };
    let mut at = 0;
    while at < region.len() {
        let Some(data) = seek(SeekFrom::Data(start + at))? else {
            break;
        };
        // Pages can be taken out of the file in between: then the hole begins right there.
        let hole = seek(SeekFrom::Hole(start + data))?.unwrap_or(data);
        if hole > data {
            let gpa = region.start_addr().0;
            for (gpa, len) in without(gpa + data, gpa + hole, replaced) {
                into.insert_range(MemoryRange { gpa, len })?;
            }
        }
        at = hole.max(data + PAGE_SIZE);
    }
    Ok(())
}

/// What is left of the memory from `start` to `end` without `ranges`, which ascend, as address and length.
fn without(start: u64, end: u64, ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let (mut at, mut left) = (start, Vec::new());
    let first = ranges.partition_point(|(gpa, len)| gpa + len <= start);
    for (gpa, len) in ranges[first..].iter().take_while(|(gpa, _)| *gpa < end) {
        if *gpa > at {
            left.push((at, gpa - at));
        }
        at = at.max(gpa + len);
    }
    if at < end {
        left.push((at, end - at));
    }
    left
}

#[cfg(test)]
mod tests {
    use migration::MemoryKind;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{create, map_private};

    const HIGH: u64 = 1 << 32;

    #[test]
    fn what_lies_in_a_private_file_is_populated_as_well() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 12).unwrap();
        file.write_all_at(&[1; 4096], 5 << 12).unwrap();
        let memory = map_private(&[(0, 4 << 12), (HIGH, 4 << 12)], &file).unwrap();
        memory.write_obj(1u8, GuestAddress(2 << 12)).unwrap();
        let mut found = PageSet::of(&memory).unwrap();
        populated(&memory, &[], &mut found).unwrap();
        assert!(found.contains(2 << 12) && found.contains(HIGH + 4096));
        assert!(!found.contains(HIGH) && !found.contains(HIGH + (3 << 12)));
        // What was given up of it lies there no more.
        let mut found = PageSet::of(&memory).unwrap();
        populated(&memory, &[(0, 4 << 12), (HIGH, 2 << 12)], &mut found).unwrap();
        assert!(found.contains(2 << 12), "this process's own");
        assert!(!found.contains(HIGH + 4096));
    }

    #[test]
    fn ranges_without_others() {
        let ranges = [(10, 5), (20, 5), (30, 5)];
        for (start, end, expected) in [
            (0, 40, &[(0, 10), (15, 5), (25, 5), (35, 5)][..]),
            (12, 22, &[(15, 5)]),
            (10, 15, &[]),
            (15, 20, &[(15, 5)]),
            (25, 28, &[(25, 3)]),
            (40, 50, &[(40, 10)]),
        ] {
            assert_eq!(without(start, end, &ranges), expected, "{start} to {end}");
        }
    }

    #[test]
    fn only_what_was_written_is_a_private_copy() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 12).unwrap();
        file.write_all_at(&[1; 8192], 5 << 12).unwrap();
        let memory = map_private(&[(0, 4 << 12), (HIGH, 4 << 12)], &file).unwrap();
        // Read, but not written: in the file, and a hole of it.
        for gpa in [HIGH + 4096, 1 << 12] {
            memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();
        }
        for gpa in [2 << 12, HIGH + (2 << 12), HIGH + (3 << 12)] {
            memory.write_obj(1u8, GuestAddress(gpa)).unwrap();
        }
        let mut found = PageSet::of(&memory).unwrap();
        private_copies(&memory, &mut found).unwrap();
        let ranges: Vec<_> = found
            .ranges(u64::MAX)
            .map(|range| (range.gpa, range.len))
            .collect();
        assert_eq!(ranges, [(2 << 12, 4096), (HIGH + (2 << 12), 8192)]);
    }

    #[test]
    fn only_what_was_written_is_populated() {
        for kind in [MemoryKind::Anonymous, MemoryKind::Shared] {
            let memory = create(&[(0, 300 << 20), (HIGH, 3 << 12)], kind).unwrap();
            // On either side of a read's and of the region's border.
            let written = [0, (256 << 20) - 4096, 256 << 20, (300 << 20) - 4096, HIGH + 4096];
            for gpa in written {
                memory.write_obj(1u8, GuestAddress(gpa)).unwrap();
            }
            let mut found = PageSet::of(&memory).unwrap();
            populated(&memory, &[], &mut found).unwrap();
            assert!(written.iter().all(|gpa| found.contains(*gpa)), "{kind:?}");
            // Huge pages, where the host gives them, are populated as a whole.
            assert!(found.len() <= 5 * 512, "{kind:?}: {} pages", found.len());
            assert!(!found.contains(128 << 20));
        }
    }
}
