//! Makes and maps guest memory: anonymous memory, huge pages, a memfd of this process, memfds of another process, or a
//! snapshot's file. What another process hands over is untrusted.
#![allow(unsafe_code)] // Advice on mappings takes raw addresses.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use devices::GuestMemory;
use guest_memory::PageMarks;
use migration::MemoryKind;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::Advice;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use super::MemoryError;
use super::available::check_available;
use super::huge_pages::check_huge_pages;
use super::marks::RamRegion;
use crate::memory::PAGE_SIZE;

/// The least memory in bytes that can hold the firmware tables and a kernel.
pub const MIN_MEMORY: u64 = 2 << 20;

/// The seals of a memfd. They keep every process from changing the file's size (to touch a mapping beyond the end of a
/// file that has shrunk is a SIGBUS), and from adding seals of its own.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Checks a requested memory size against this host.
pub fn check_size(size: u64) -> Result<(), MemoryError> {
    if !size.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryError::NotPages(size));
    }
    if size < MIN_MEMORY {
        return Err(MemoryError::TooSmall(size));
    }
    let info = rustix::system::sysinfo();
    let host = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit));
    if size > host {
        return Err(MemoryError::MoreThanHost { got: size, host });
    }
    Ok(())
}

/// Checks that guest memory of that size and kind can be had here, so that it is refused before a guest depends on it
/// rather than missing when the guest first touches it.
pub fn check_room(size: u64, kind: MemoryKind) -> Result<(), MemoryError> {
    match kind {
        // The host has set them aside: they are no part of what is available, and no cgroup's memory.
        MemoryKind::HugePages => check_huge_pages(size),
        MemoryKind::Anonymous | MemoryKind::Shared => check_available(size),
    }
}

/// Zeroed guest memory of the given ranges, if there is room for all of it.
pub fn create(ranges: &[(u64, u64)], kind: MemoryKind) -> Result<GuestMemory, MemoryError> {
    check_room(total(ranges), kind)?;
    let mut mappings = Vec::with_capacity(ranges.len());
    for (_, len) in ranges {
        let backing = match kind {
            MemoryKind::Anonymous => Backing::Anonymous,
            MemoryKind::Shared => Backing::Shared(memfd(*len)?),
            MemoryKind::HugePages => Backing::HugePages,
        };
        mappings.push(map(*len, backing)?);
    }
    place(ranges, mappings)
}

/// Guest memory of the given ranges that are the given files, one for each. The files are untrusted: expected
/// are memfds of the ranges' lengths that cannot shrink.
pub fn adopt(ranges: &[(u64, u64)], files: Vec<OwnedFd>) -> Result<GuestMemory, MemoryError> {
    if files.len() != ranges.len() {
        return Err(MemoryError::FileCount {
            expected: ranges.len(),
            got: files.len(),
        });
    }
    let mut mappings = Vec::with_capacity(ranges.len());
    for (index, (file, (_, len))) in files.into_iter().zip(ranges).enumerate() {
        check_file(index, &file, *len)?;
        mappings.push(map(*len, Backing::Shared(file.into()))?);
    }
    place(ranges, mappings)
}

/// Guest memory of the given ranges, whose pages are those of the file, one range after the other, until they are
/// written to: the file is only read. It must have all of them, as long as the memory lives: a page that is not there
/// kills the process that touches it. There must be room for all of it, as the guest may write to all of it.
pub fn map_private(ranges: &[(u64, u64)], file: &File) -> Result<GuestMemory, MemoryError> {
    check_available(total(ranges))?;
    let (mut mappings, mut offset) = (Vec::with_capacity(ranges.len()), 0);
    for (_, len) in ranges {
        let file = file.try_clone().map_err(MemoryError::Private)?;
        mappings.push(map(*len, Backing::Private(FileOffset::new(file, offset)))?);
        offset += len;
    }
    place(ranges, mappings)
}

fn total(ranges: &[(u64, u64)]) -> u64 {
    ranges
        .iter()
        .map(|(_, len)| len)
        .fold(0, |sum, len| sum.saturating_add(*len))
}

/// The ranges of memory as `(gpa, length)`.
pub fn ranges(memory: &GuestMemory) -> Vec<(u64, u64)> {
    memory
        .iter()
        .map(|region| (region.start_addr().0, region.len()))
        .collect()
}

/// What the memory is made of.
pub fn kind(memory: &GuestMemory) -> MemoryKind {
    let all = |has: fn(&RamRegion) -> bool| memory.iter().all(has);
    if all(|region| shared_file(region).is_some()) {
        MemoryKind::Shared
    } else if all(has_huge_pages) {
        MemoryKind::HugePages
    } else {
        MemoryKind::Anonymous
    }
}

/// The memfds behind shared memory, in the order of its regions; nothing for other memory.
pub fn files(memory: &GuestMemory) -> io::Result<Option<Vec<OwnedFd>>> {
    memory
        .iter()
        .map(|region| shared_file(region).map(|file| file.try_clone().map(OwnedFd::from)))
        .collect::<Option<io::Result<Vec<_>>>>()
        .transpose()
}

/// The file that a region writes to.
pub(super) fn shared_file(region: &RamRegion) -> Option<&File> {
    let mapping: &MmapRegion<PageMarks> = region;
    let shared = mapping.flags() & libc::MAP_SHARED != 0;
    region.file_offset().filter(|_| shared).map(FileOffset::file)
}

fn has_huge_pages(region: &RamRegion) -> bool {
    let mapping: &MmapRegion<PageMarks> = region;
    mapping.flags() & libc::MAP_HUGETLB != 0
}

fn memfd(len: u64) -> Result<File, MemoryError> {
    let make = || {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = rustix::fs::memfd_create("godwit-guest-memory", flags)?;
        rustix::fs::ftruncate(&memfd, len)?;
        rustix::fs::fcntl_add_seals(&memfd, SEALS)?;
        Ok(memfd.into())
    };
    make().map_err(|source: rustix::io::Errno| MemoryError::Memfd {
        len,
        source: source.into(),
    })
}

/// File system of memfds with ordinary pages (statfs(2)).
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

fn check_file(index: usize, file: &OwnedFd, expected: u64) -> Result<(), MemoryError> {
    // Only memfds have seals: for every other kind of file this fails.
    let seals = rustix::fs::fcntl_get_seals(file).map_err(|source| MemoryError::NotMemfd {
        index,
        source: source.into(),
    })?;
    if !seals.contains(SealFlags::SHRINK) {
        let got = seals.bits();
        return Err(MemoryError::NotSealed { index, got });
    }
    // A page of a huge-page file that cannot be allocated kills the process that touches it.
    let ordinary = rustix::fs::fstatfs(file).is_ok_and(|system| system.f_type == TMPFS_MAGIC);
    if !ordinary {
        return Err(MemoryError::OtherPages { index });
    }
    // Only now: before the seal was seen, the size was no promise.
    let stat = rustix::fs::fstat(file).map_err(|source| MemoryError::File {
        index,
        source: source.into(),
    })?;
    let got = u64::try_from(stat.st_size).unwrap_or(0);
    if got != expected {
        return Err(MemoryError::FileSize { index, expected, got });
    }
    Ok(())
}

/// Puts each mapping at the guest-physical address of its range.
fn place(ranges: &[(u64, u64)], mappings: Vec<MmapRegion<PageMarks>>) -> Result<GuestMemory, MemoryError> {
    let regions = ranges
        .iter()
        .zip(mappings)
        .map(|((gpa, len), mapping)| {
            GuestRegionMmap::new(mapping, GuestAddress(*gpa)).ok_or_else(|| {
                MemoryError::Regions(format!(
                    "{len} bytes at {gpa:#x} pass the end of the address space"
                ))
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestMemoryMmap::from_regions(regions).map_err(|error| MemoryError::Regions(error.to_string()))
}

/// What a mapping is made of.
enum Backing {
    Anonymous,
    HugePages,
    /// A memfd, which is written to.
    Shared(File),
    /// A file, which is only read.
    Private(FileOffset),
}

fn map(len: u64, backing: Backing) -> Result<MmapRegion<PageMarks>, MemoryError> {
    let builder = MmapRegionBuilder::new_with_bitmap(len as usize, PageMarks::with_len(len as usize))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    let builder = match backing {
        Backing::Anonymous => {
            builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        }
        // Without MAP_NORESERVE all of them are this mapping's from here on: none can be missing when it is touched.
        Backing::HugePages => builder.with_mmap_flags(
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
        ),
        Backing::Shared(file) => builder
            .with_file_offset(FileOffset::new(file, 0))
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE),
        Backing::Private(file) => builder
            .with_file_offset(file)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE),
    };
    let region = builder
        .build()
        .map_err(|source| MemoryError::Map { len, source })?;
    // A kernel without transparent huge pages refuses, and pages of 4 KiB serve as well.
    advise(&region, Advice::LinuxHugepage);
    // The content of a guest's memory does not belong into a core dump of this process.
    advise(&region, Advice::LinuxDontDump);
    Ok(region)
}

/// Has the kernel share no page of it with other memory of the same content any more (KSM).
pub fn unmerge(memory: &GuestMemory) -> Result<(), MemoryError> {
    for region in memory.iter() {
        let (start, len) = (region.as_ptr(), region.len() as usize);
        // SAFETY: the range is one mapping that `memory` owns; that its pages are its own changes no content.
        let advised = unsafe { rustix::mm::madvise(start.cast(), len, Advice::LinuxUnmergeable) };
        match advised {
            // A kernel that cannot share pages.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(MemoryError::Unmerge(error.into())),
        }
    }
    Ok(())
}

/// Gives the kernel advice. Nothing depends on it, so an error is only logged.
fn advise(region: &MmapRegion<PageMarks>, advice: Advice) {
    // SAFETY: the range is one mapping that `region` owns, and neither MADV_HUGEPAGE nor MADV_DONTDUMP changes its
    // content.
    let advised = unsafe { rustix::mm::madvise(region.as_ptr().cast(), region.size(), advice) };
    if let Err(error) = advised {
        tracing::debug!(%error, ?advice, "advice on guest memory was not taken");
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;

    const LEN: u64 = 64 << 10;

    #[test]
    fn bad_sizes_are_refused_by_name() {
        assert_eq!(
            check_size(0).unwrap_err().to_string(),
            "memory: expected at least 2097152 bytes, got 0"
        );
        assert!(matches!(check_size(4097), Err(MemoryError::NotPages(4097))));
        assert!(matches!(
            check_size(1 << 50),
            Err(MemoryError::MoreThanHost { .. })
        ));
        check_size(64 << 20).unwrap();
    }

    #[test]
    fn memory_that_is_handed_over_is_the_same_memory() {
        let ranges = [(0, LEN), (1 << 32, 2 * LEN)];
        let memory = create(&ranges, MemoryKind::Shared).unwrap();
        assert_eq!(kind(&memory), MemoryKind::Shared);
        let other = adopt(&ranges, files(&memory).unwrap().unwrap()).unwrap();
        for gpa in [1, (1 << 32) + LEN] {
            memory.write_obj(gpa, GuestAddress(gpa)).unwrap();
            assert_eq!(other.read_obj::<u64>(GuestAddress(gpa)).unwrap(), gpa);
        }
        assert!(kind(&other) == MemoryKind::Shared && super::ranges(&other) == ranges);
        // And on to the next.
        adopt(&ranges, files(&other).unwrap().unwrap()).unwrap();
        assert!(
            files(&create(&ranges, MemoryKind::Anonymous).unwrap())
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn a_file_that_is_mapped_privately_stays_as_it_is() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * LEN).unwrap();
        file.write_all_at(&[7; 4096], LEN + 4096).unwrap();
        let memory = map_private(&[(0, LEN), (1 << 32, 2 * LEN)], &file).unwrap();
        assert!(kind(&memory) == MemoryKind::Anonymous && files(&memory).unwrap().is_none());
        let gpa = GuestAddress((1 << 32) + 4096);
        assert_eq!(memory.read_obj::<u8>(gpa).unwrap(), 7);
        memory.write_obj(8u8, gpa).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, LEN + 4096).unwrap();
        assert_eq!((byte, memory.read_obj::<u8>(gpa).unwrap()), ([7], 8));
    }

    #[test]
    fn files_that_are_not_what_was_promised_are_refused() {
        let message = |files: Vec<OwnedFd>| adopt(&[(0, LEN)], files).unwrap_err().to_string();
        assert!(message(Vec::new()).ends_with("expected 1 files, got 0"));
        assert!(message(vec![memfd(LEN - 4096).unwrap().into()]).ends_with("bytes, got 61440 bytes"));
        assert!(message(vec![memfd(LEN + 4096).unwrap().into()]).ends_with("bytes, got 69632 bytes"));

        let open = rustix::fs::memfd_create("open", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&open, LEN).unwrap();
        assert!(message(vec![open]).ends_with("sealed against shrinking, got seals 0x0"));

        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0; LEN as usize]).unwrap();
        assert!(message(vec![file.into()]).contains("expected a memfd"));
        let (reader, _) = io::pipe().unwrap();
        assert!(message(vec![reader.into()]).contains("expected a memfd"));
    }

    #[test]
    fn a_memfd_of_ours_keeps_its_size() {
        let memfd = memfd(LEN).unwrap();
        for len in [0, 2 * LEN] {
            assert_eq!(rustix::fs::ftruncate(&memfd, len), Err(rustix::io::Errno::PERM));
        }
        assert!(rustix::fs::fcntl_add_seals(&memfd, SealFlags::FUTURE_WRITE).is_err());
    }
}
