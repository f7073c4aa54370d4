//! Writes guest memory to a snapshot's file and reads it back, block by block, on several threads, with a checksum for
//! each block.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use devices::GuestMemory;
use guest_memory::PageMarks;
use migration::{MemoryRegion, PageSet};
use threads::{Role, joined};
use vm_memory::bitmap::RefSlice;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile,
};
use xxhash_rust::xxh3::Xxh3;

use super::{SnapshotError, SnapshotWatch};
use crate::memory::PAGE_SIZE;

/// Bytes of guest memory with a checksum of their own; the last of a region may be shorter.
pub(super) const BLOCK: u64 = 2 << 20;
/// The most threads: more of them would only wait for memory or for the disk.
const MAX_THREADS: usize = 4;
/// Bytes of memory for which a word of a page set has bits.
const WORD: u64 = 64 * PAGE_SIZE;

/// A block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemoryBlock {
    /// Where it is in the guest.
    pub(super) gpa: u64,
    pub(super) len: u64,
    /// Where it is in the file.
    pub(super) offset: u64,
    /// The region that it is in, and its first page there.
    pub(super) region: usize,
    pub(super) page: u64,
}

impl MemoryBlock {
    /// The set's bits for the block's pages.
    fn words_of(&self, pages: &PageSet) -> Vec<u64> {
        pages.words(
            self.region,
            (self.page / 64) as usize,
            self.len.div_ceil(WORD) as usize,
        )
    }

    /// The error for a block whose checksum is not the expected one.
    pub(super) fn damaged(&self, path: &Path, expected: u64, got: u64) -> SnapshotError {
        SnapshotError::MemoryBlock {
            path: path.into(),
            offset: self.offset,
            len: self.len,
            expected,
            got,
        }
    }
}

/// The checksums of all blocks, and the number of pages that are not zero.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StoredBlocks {
    pub(super) checksums: Vec<u64>,
    pub(super) pages: u64,
}

/// Bytes of all regions together; nothing where that is more than there can be.
pub(super) fn file_len(regions: &[MemoryRegion]) -> Option<u64> {
    regions
        .iter()
        .try_fold(0u64, |sum, region| sum.checked_add(region.len))
}

/// Number of blocks of these regions.
pub(super) fn count(regions: &[MemoryRegion]) -> u64 {
    regions.iter().map(|region| region.len.div_ceil(BLOCK)).sum()
}

/// Writes those pages of `memory` to the file that are in `pages` and not zero. Nothing may write to
/// the memory meanwhile.
pub(super) fn write(
    memory: &GuestMemory,
    pages: &PageSet,
    file: &File,
    path: &Path,
    watch: &SnapshotWatch,
) -> Result<StoredBlocks, SnapshotError> {
    let open = || open_again(file, OpenOptions::new().write(true), path);
    each_block(memory, watch, open, |file, block| {
        let words = block.words_of(pages);
        write_block(file, block, memory, block.gpa, &words, path)
    })
}

/// Writes those pages of a block to the file that are `candidates` (a bit for each) and not zero, from `memory`, where the
/// block begins at `gpa`. Returns the block's checksum, and how many of its pages are not zero.
pub(super) fn write_block(
    file: &mut File,
    block: &MemoryBlock,
    memory: &GuestMemory,
    gpa: u64,
    candidates: &[u64],
    path: &Path,
) -> Result<(u64, u64), SnapshotError> {
    let there = MemoryBlock { gpa, ..*block };
    let stored = stored_pages(memory, &there, |word| candidates.get(word).copied().unwrap_or(0))?;
    for run in runs(&stored) {
        let (start, len) = (run.start * PAGE_SIZE, (run.end - run.start) * PAGE_SIZE);
        file.seek(SeekFrom::Start(block.offset + start))
            .map_err(SnapshotError::io(path))?;
        let slice = slice(memory, gpa + start, len, path)?;
        file.write_all_volatile(&slice)
            .map_err(|error| SnapshotError::io(path)(io_error(error)))?;
    }
    hash(memory, &there, &stored, path)
}

/// Reads the file into `memory` and compares it with the checksums: all that is no hole, into memory that is zero so
/// far; or just the `changed` pages.
pub(super) fn read(
    memory: &GuestMemory,
    file: &File,
    path: &Path,
    changed: Option<&PageSet>,
    expected: &[u64],
    watch: &SnapshotWatch,
) -> Result<(), SnapshotError> {
    let open = || open_again(file, OpenOptions::new().read(true), path);
    let found = each_block(memory, watch, open, |file, block| {
        let ranges = match changed {
            None => data_ranges(file, block, path)?,
            Some(pages) => runs(&block.words_of(pages))
                .into_iter()
                .map(|run| run.start * PAGE_SIZE..run.end * PAGE_SIZE)
                .collect(),
        };
        let read = read_block(file, block, &ranges, memory, block.gpa, path)?;
        Ok((read.checksum, read.count))
    })?;
    let wrong = found
        .checksums
        .iter()
        .zip(expected)
        .position(|(found, expected)| found != expected);
    match wrong {
        Some(index) => Err(blocks(memory)[index].damaged(path, expected[index], found.checksums[index])),
        None => Ok(()),
    }
}

/// What was read of a block.
#[derive(Debug)]
pub(super) struct ReadBlock {
    /// A bit for each page that is not zero.
    pub(super) stored: Vec<u64>,
    pub(super) checksum: u64,
    /// How many pages are not zero.
    count: u64,
}

/// Reads those ranges of a block, in bytes from its begin, into `memory`, where the block begins at `gpa`. A page that is
/// not read is not touched, and counts as zero.
pub(super) fn read_block(
    file: &mut File,
    block: &MemoryBlock,
    ranges: &[Range<u64>],
    memory: &GuestMemory,
    gpa: u64,
    path: &Path,
) -> Result<ReadBlock, SnapshotError> {
    // To touch a page that is not read would allocate a page of zeroes.
    let mut filled = vec![0; block.len.div_ceil(WORD) as usize];
    for Range { start, end } in ranges {
        file.seek(SeekFrom::Start(block.offset + start))
            .map_err(SnapshotError::io(path))?;
        let mut slice = slice(memory, gpa + start, end - start, path)?;
        file.read_exact_volatile(&mut slice)
            .map_err(|error| SnapshotError::io(path)(io_error(error)))?;
        for page in start / PAGE_SIZE..end.div_ceil(PAGE_SIZE) {
            filled[(page / 64) as usize] |= 1 << (page % 64);
        }
    }
    let there = MemoryBlock { gpa, ..*block };
    let stored = stored_pages(memory, &there, |word| filled[word])?;
    let (checksum, count) = hash(memory, &there, &stored, path)?;
    Ok(ReadBlock {
        stored,
        checksum,
        count,
    })
}

/// Opens the file once more for a thread, which so has a position of its own. It is the very file that was made or
/// checked, whatever its name leads to by now.
pub(super) fn open_again(file: &File, how: &OpenOptions, path: &Path) -> Result<File, SnapshotError> {
    how.open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(SnapshotError::io(path))
}

/// Does `work` for every block on several threads, each with what `open` gives it. `work` returns a block's checksum and
/// how many of its pages are not zero.
fn each_block<T>(
    memory: &GuestMemory,
    watch: &SnapshotWatch,
    open: impl Fn() -> Result<T, SnapshotError> + Sync,
    work: impl Fn(&mut T, &MemoryBlock) -> Result<(u64, u64), SnapshotError> + Sync,
) -> Result<StoredBlocks, SnapshotError> {
    let blocks = blocks(memory);
    watch.begin(blocks.iter().map(|block| block.len).sum());
    let checksums: Vec<AtomicU64> = blocks.iter().map(|_| AtomicU64::new(0)).collect();
    let (next, pages) = (AtomicUsize::new(0), AtomicU64::new(0));
    // After one thread's error no thread begins another block.
    let give_up = || next.store(blocks.len(), Ordering::Relaxed);
    let turns = || -> Result<(), SnapshotError> {
        let mut own = open()?;
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let (Some(block), Some(checksum)) = (blocks.get(index), checksums.get(index)) else {
                return Ok(());
            };
            let (sum, count) = work(&mut own, block)?;
            checksum.store(sum, Ordering::Relaxed);
            pages.fetch_add(count, Ordering::Relaxed);
            watch.advance(block.len)?;
        }
    };
    let take_turns = || turns().inspect_err(|_| give_up());
    let helpers = thread::available_parallelism().map_or(1, |count| count.get().min(MAX_THREADS)) - 1;
    thread::scope(|scope| {
        let helper = |_| {
            threads::spawn_scoped(scope, Role::Helper, "snapshot", take_turns)
                .map_err(SnapshotError::Thread)
                .inspect_err(|_| give_up())
        };
        let helpers: Vec<_> = (0..helpers).map(helper).collect::<Result<_, _>>()?;
        let mut done = take_turns();
        for helper in helpers {
            let failed = |failure| Err(SnapshotError::Thread(io::Error::other(failure)));
            done = done.and(joined(helper.join()).unwrap_or_else(failed));
        }
        done
    })?;
    Ok(StoredBlocks {
        checksums: checksums.into_iter().map(AtomicU64::into_inner).collect(),
        pages: pages.into_inner(),
    })
}

/// All blocks of the memory, in the order of the file.
pub(super) fn blocks(memory: &GuestMemory) -> Vec<MemoryBlock> {
    let (mut blocks, mut offset) = (Vec::new(), 0);
    for (index, (gpa, len)) in crate::memory::ranges(memory).into_iter().enumerate() {
        for start in (0..len).step_by(BLOCK as usize) {
            let len = BLOCK.min(len - start);
            blocks.push(MemoryBlock {
                gpa: gpa + start,
                len,
                offset,
                region: index,
                page: start / PAGE_SIZE,
            });
            offset += len;
        }
    }
    blocks
}

/// A bit for each page of the block that is a candidate and not zero.
fn stored_pages(
    memory: &GuestMemory,
    block: &MemoryBlock,
    candidates: impl Fn(usize) -> u64,
) -> Result<Vec<u64>, SnapshotError> {
    let mut stored = Vec::with_capacity(block.len.div_ceil(WORD) as usize);
    for (word, start) in (0..block.len).step_by(WORD as usize).enumerate() {
        let pages = (block.len - start).min(WORD) / PAGE_SIZE;
        let inside = u64::MAX >> (64 - pages);
        let bits = candidates(word) & inside;
        let zero = migration_io::zero_pages(memory, block.gpa + start, bits)?;
        stored.push(bits & !zero);
    }
    Ok(stored)
}

/// The runs of set bits, as pages of the block.
pub(super) fn runs(words: &[u64]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in set_bits(words) {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

/// The numbers of the bits that are set.
fn set_bits(words: &[u64]) -> impl Iterator<Item = u64> {
    (0u64..).zip(words).flat_map(|(index, word)| {
        (0..64)
            .filter(move |bit| word >> bit & 1 != 0)
            .map(move |bit| index * 64 + bit)
    })
}

/// The checksum of a block, and how many of its pages are not zero. It is made of the number in the block and the content
/// of each of those pages, and so is the same whether a page of zeroes is a hole or not.
fn hash(
    memory: &GuestMemory,
    block: &MemoryBlock,
    stored: &[u64],
    path: &Path,
) -> Result<(u64, u64), SnapshotError> {
    let (mut hash, mut count) = (Xxh3::new(), 0);
    let mut content = [0; PAGE_SIZE as usize];
    for page in set_bits(stored) {
        // Hashing a copy that stays in the cache costs little, and needs no Rust reference to guest memory.
        slice(memory, block.gpa + page * PAGE_SIZE, PAGE_SIZE, path)?.copy_to(&mut content[..]);
        hash.update(&(page as u32).to_le_bytes());
        hash.update(&content);
        count += 1;
    }
    Ok((hash.digest(), count))
}

pub(super) type Slice<'a> = VolatileSlice<'a, RefSlice<'a, PageMarks>>;

/// A part of memory.
pub(super) fn slice<'a>(
    memory: &'a GuestMemory,
    gpa: u64,
    len: u64,
    path: &Path,
) -> Result<Slice<'a>, SnapshotError> {
    memory
        .get_slice(GuestAddress(gpa), len as usize)
        .map_err(|error| SnapshotError::io(path)(io::Error::other(error)))
}

/// The pages of the block's part of the file that are not all hole, in bytes from the block's begin.
pub(super) fn data_ranges(
    file: &File,
    block: &MemoryBlock,
    path: &Path,
) -> Result<Vec<Range<u64>>, SnapshotError> {
    use rustix::fs::{SeekFrom, seek};
    let failed = |error: rustix::io::Errno| SnapshotError::io(path)(error.into());
    let end = block.offset + block.len;
    let (mut found, mut at) = (Vec::new(), block.offset);
    while at < end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if (at..end).contains(&start) => start,
            // Nothing but a hole up to the end of the file.
            Ok(start) if start >= end => break,
            Err(rustix::io::Errno::NXIO) => break,
            Ok(start) => return Err(SnapshotError::io(path)(bad_offset(at, start))),
            Err(error) => return Err(failed(error)),
        };
        let hole = seek(file, SeekFrom::Hole(start)).map_err(failed)?;
        if hole <= start {
            return Err(SnapshotError::io(path)(bad_offset(start + 1, hole)));
        }
        at = hole.min(end);
        found.push(whole_pages(start - block.offset..at - block.offset));
    }
    Ok(found)
}

/// A range that ends where pages do. A file system may have holes that do not.
fn whole_pages(range: Range<u64>) -> Range<u64> {
    range.start / PAGE_SIZE * PAGE_SIZE..range.end.next_multiple_of(PAGE_SIZE)
}

/// The checksum of a block without any page that is not zero.
pub(super) fn checksum_of_zeroes() -> u64 {
    Xxh3::new().digest()
}

/// The error for a file system that gives no usable answer about holes.
fn bad_offset(from: u64, got: u64) -> io::Error {
    io::Error::other(format!(
        "SEEK_DATA, SEEK_HOLE: expected an offset from {from} on, got {got}"
    ))
}

fn io_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_with_a_hole_in_it_is_read_as_a_whole() {
        assert_eq!(whole_pages(1024..5000), 0..8192);
        assert_eq!(whole_pages(4096..8192), 4096..8192);
    }
}
