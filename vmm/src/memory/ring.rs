//! One vCPU's dirty ring: memory that KVM fills and this process empties (api.rst, 8.29).
#![allow(unsafe_code)] // Memory shared with the kernel.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::raw::c_void;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::KVM_DIRTY_LOG_PAGE_OFFSET;
use rustix::mm::{MapFlags, ProtFlags};

use crate::memory::PAGE_SIZE;

/// KVM has written the entry.
const DIRTY: u32 = 1;
/// The entry was collected: KVM may protect its page and use it again.
const RESET: u32 = 2;

/// `struct kvm_dirty_gfn`.
#[repr(C)]
struct RingEntry {
    flags: AtomicU32,
    slot: u32,
    offset: u64,
}

/// Bytes of an entry.
pub(super) const ENTRY: usize = size_of::<RingEntry>();

/// A page that a vCPU wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirtyPage {
    pub(super) slot: u32,
    pub(super) page: u64,
}

/// A vCPU's ring.
pub(super) struct DirtyRing {
    entries: NonNull<RingEntry>,
    count: usize,
    /// The entry that KVM fills next, or has filled.
    next: usize,
}

// SAFETY: the mapping belongs to the process and not to a thread; it is only used through `&mut self`.
unsafe impl Send for DirtyRing {}

impl DirtyRing {
    /// The ring of `count` entries of a vCPU, on whose VM such rings are enabled.
    pub(super) fn map(vcpu: &impl AsRawFd, count: usize) -> io::Result<Self> {
        // SAFETY: `vcpu` is borrowed, so its descriptor stays open during this call.
        let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        let len = count * ENTRY;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let mapped = unsafe { rustix::mm::mmap(ptr::null_mut(), len, access, flags, vcpu, offset) }?;
        let entries = NonNull::new(mapped.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            entries,
            count,
            next: 0,
        })
    }

    /// Takes out what is there: at most as many entries as the ring has, however fast the vCPU writes more.
    /// KVM protects their pages when its rings are reset. Returns how many there were.
    pub(super) fn collect(&mut self, into: &mut Vec<DirtyPage>) -> u64 {
        let mut collected = 0;
        for _ in 0..self.count {
            // SAFETY: `next` is less than `count`, and the mapping has as many entries. KVM writes the other
            // fields before it sets DIRTY and leaves them alone until RESET, so that after the load below they
            // can be read; any bits are valid.
            let entry = unsafe { self.entries.add(self.next).as_ptr() };
            // SAFETY: as above; the flags are only accessed as an atomic, here as in the kernel.
            let flags = unsafe { &(*entry).flags };
            if flags.load(Ordering::Acquire) != DIRTY {
                break;
            }
            // SAFETY: as above.
            let (slot, page) = unsafe { ((*entry).slot, (*entry).offset) };
            into.push(DirtyPage { slot, page });
            flags.store(RESET, Ordering::Release);
            self.next = (self.next + 1) % self.count;
            collected += 1;
        }
        collected
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        let (start, len) = (self.entries.as_ptr().cast::<c_void>(), self.count * ENTRY);
        // SAFETY: it is the mapping made in `map`, and nothing refers to it any more.
        let unmapped = unsafe { rustix::mm::munmap(start, len) };
        if let Err(error) = unmapped {
            tracing::error!(%error, "a dirty ring stays mapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;

    use super::*;

    /// A ring in a file at the offset that a vCPU has it at, and the test as the kernel.
    fn ring(count: usize) -> DirtyRing {
        let file = rustix::fs::memfd_create("ring", MemfdFlags::CLOEXEC).unwrap();
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE;
        rustix::fs::ftruncate(&file, offset + (count * ENTRY) as u64).unwrap();
        DirtyRing::map(&file, count).unwrap()
    }

    fn push(ring: &DirtyRing, index: usize, page: u64) {
        // SAFETY: the index is in the ring, and no other code uses the ring now.
        let entry = unsafe { &mut *ring.entries.add(index).as_ptr() };
        (entry.slot, entry.offset) = (1, page);
        entry.flags.store(DIRTY, Ordering::Release);
    }

    fn flags(ring: &DirtyRing, index: usize) -> u32 {
        // SAFETY: as above.
        unsafe { (*ring.entries.add(index).as_ptr()).flags.load(Ordering::Acquire) }
    }

    #[test]
    fn entries_are_collected_once_and_in_order() {
        let mut ring = ring(256);
        let mut pages = Vec::new();
        assert_eq!(ring.collect(&mut pages), 0);
        (0..3).for_each(|index| push(&ring, index, 100 + index as u64));
        assert_eq!(ring.collect(&mut pages), 3);
        assert_eq!(pages[2], DirtyPage { slot: 1, page: 102 });
        assert!((0..3).all(|index| flags(&ring, index) == RESET));
        assert_eq!(ring.collect(&mut pages), 0, "collected, and not yet reset");
    }

    #[test]
    fn a_full_ring_wraps_and_ends() {
        let mut ring = ring(256);
        let mut pages = Vec::new();
        for round in 0..3 {
            (0..256).for_each(|index| push(&ring, index, round));
            assert_eq!(ring.collect(&mut pages), 256);
        }
        assert_eq!(pages.len(), 3 * 256);
    }
}
