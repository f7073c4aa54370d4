//! How pages of the guest are given back to the host.

#![allow(
    unsafe_code,
    reason = "what changes the content of a mapping takes a raw address"
)]

use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::fs::FallocateFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use vm_memory::bitmap::{Bitmap, BitmapSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, VolatileSlice};

use super::PAGE_SIZE;
use super::replaced::Replaced;
use crate::GuestMemory;

/// Why pages were not given back to the host.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiscardError {
    /// They are not pages of the guest's.
    #[error("pages to give up: expected some inside one region of guest memory")]
    Outside(#[source] GuestMemoryError),
    /// The host's kernel has refused.
    #[error("pages to give up: the host does not take them back")]
    Host(#[source] io::Error),
}

/// Gives the whole pages among `len` bytes at `gpa` back to the host and returns how many bytes they have: all of them, or
/// less where `replaced` has no room for more. They read as zeroes afterwards, and count as written.
pub(super) fn discard(
    memory: &GuestMemory,
    gpa: u64,
    len: u64,
    replaced: &Mutex<Replaced>,
) -> Result<u64, DiscardError> {
    let Some((gpa, len)) = whole_pages(gpa, len) else {
        return Ok(0);
    };
    let at = GuestAddress(gpa);
    let slice = memory
        .get_slice(at, len as usize)
        .map_err(DiscardError::Outside)?;
    let region = memory.find_region(at);
    let file = region.and_then(|region| Some((region, region.file_offset()?)));
    let done = match file {
        // Dropping the mapping's pages is not enough: the file would still hold their content.
        Some((region, file)) if region.flags() & libc::MAP_SHARED != 0 => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let offset = file.start() + (gpa - region.start_addr().0);
            rustix::fs::fallocate(file.file(), flags, offset, len).map(|()| len)
        }
        Some((region, _)) => replace(&slice, region, gpa - region.start_addr().0, replaced),
        None => drop_pages(&slice, 0, slice.len()).map(|()| len),
    };
    slice.bitmap().mark_dirty(0, slice.len());
    done.map_err(|error| DiscardError::Host(error.into()))
}

/// Gives up pages of a file that is mapped privately. Dropped pages would show the file's content again, so zeroes are
/// mapped over those that are given up for the first time, and the others are dropped. Returns the bytes given up.
fn replace<B: BitmapSlice>(
    slice: &VolatileSlice<'_, B>,
    region: &impl GuestMemoryRegion,
    offset: u64,
    replaced: &Mutex<Replaced>,
) -> rustix::io::Result<u64> {
    let (start, len) = (region.start_addr().0, region.len());
    let (first, end) = (offset / PAGE_SIZE, (offset + slice.len() as u64) / PAGE_SIZE);
    let mut replaced = replaced.lock().unwrap_or_else(PoisonError::into_inner);
    let mut done = 0;
    for run in replaced.runs(start, len, first, end) {
        let at = ((run.first - first) * PAGE_SIZE) as usize;
        let bytes = ((run.end - run.first) * PAGE_SIZE) as usize;
        if run.is_replaced {
            drop_pages(slice, at, bytes)?;
        } else if replaced.has_room_for(start, len, run) {
            map_zeroes(slice, at, bytes)?;
            replaced.insert(start, len, run);
        } else {
            continue;
        }
        done += bytes as u64;
    }
    Ok(done)
}

fn drop_pages<B: BitmapSlice>(
    slice: &VolatileSlice<'_, B>,
    at: usize,
    bytes: usize,
) -> rustix::io::Result<()> {
    let guard = slice.ptr_guard_mut();
    let address = guard.as_ptr().wrapping_add(at).cast();
    // SAFETY: the range is inside the slice, which is mapped guest memory, whole pages of it, and the guard keeps it so
    // during the call. No Rust reference to guest memory exists, and this process's own safety counts on nothing in it.
    unsafe { madvise(address, bytes, Advice::LinuxDontNeed) }
}

fn map_zeroes<B: BitmapSlice>(
    slice: &VolatileSlice<'_, B>,
    at: usize,
    bytes: usize,
) -> rustix::io::Result<()> {
    let guard = slice.ptr_guard_mut();
    let address = guard.as_ptr().wrapping_add(at).cast();
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the range is inside the slice, which is mapped guest memory, whole pages of it. What takes their place is
    // as accessible as they were, and is unmapped with them: the region's owner unmaps all of its range. KVM's slots go
    // by addresses and follow. No Rust reference to guest memory exists.
    unsafe {
        mmap_anonymous(address, bytes, access, flags)?;
        // As the rest of guest memory is: a dump of this process has nothing of it.
        madvise(address, bytes, Advice::LinuxDontDump)
    }
}

/// The whole pages in a range: their address and length in bytes.
pub(super) fn whole_pages(address: u64, len: u64) -> Option<(u64, u64)> {
    let end = address.saturating_add(len) / PAGE_SIZE * PAGE_SIZE;
    let start = address.checked_next_multiple_of(PAGE_SIZE)?;
    (start < end).then(|| (start, end - start))
}
