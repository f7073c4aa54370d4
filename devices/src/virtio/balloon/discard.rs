//! Pages of the guest that go back to the host.

#![allow(
    unsafe_code,
    reason = "advice that changes the content of a mapping takes a raw address"
)]

use std::io;

use rustix::fs::FallocateFlags;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::PAGE_SIZE;
use crate::GuestMemory;

/// Why pages stay where they are.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiscardError {
    /// They are no pages of the guest's.
    #[error("pages to give up: expected some inside one region of guest memory")]
    Outside(#[source] GuestMemoryError),
    /// The host does not take them.
    #[error("pages to give up: the host does not take them back")]
    Host(#[source] io::Error),
}

/// Gives the whole pages among `len` bytes at `gpa` back to the host and returns how many bytes they have. Nobody knows
/// what they hold afterwards, so they count as written.
pub(super) fn discard(memory: &GuestMemory, gpa: u64, len: u64) -> Result<u64, DiscardError> {
    let Some((gpa, len)) = whole_pages(gpa, len) else {
        return Ok(0);
    };
    let at = GuestAddress(gpa);
    let slice = memory
        .get_slice(at, len as usize)
        .map_err(DiscardError::Outside)?;
    let shared = memory.find_region(at).and_then(|region| {
        let file = region.file_offset()?;
        let shared = region.flags() & libc::MAP_SHARED != 0;
        shared.then(|| (file.file(), file.start() + (gpa - region.start_addr().0)))
    });
    let done = match shared {
        // The mapping's pages alone would come back as they were.
        Some((file, offset)) => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file, flags, offset, len)
        }
        None => {
            let guard = slice.ptr_guard_mut();
            // SAFETY: the slice is mapped guest memory, whole pages of it, and the guard keeps it so during the call.
            // No Rust reference to guest memory exists, and this process's own safety counts on nothing in it.
            unsafe {
                rustix::mm::madvise(
                    guard.as_ptr().cast(),
                    slice.len(),
                    rustix::mm::Advice::LinuxDontNeed,
                )
            }
        }
    };
    slice.bitmap().mark_dirty(0, slice.len());
    done.map_err(|error| DiscardError::Host(error.into()))?;
    Ok(len)
}

/// The pages that lie in a range as a whole: their address and length in bytes.
pub(super) fn whole_pages(address: u64, len: u64) -> Option<(u64, u64)> {
    let end = address.saturating_add(len) / PAGE_SIZE * PAGE_SIZE;
    let start = address.checked_next_multiple_of(PAGE_SIZE)?;
    (start < end).then(|| (start, end - start))
}
