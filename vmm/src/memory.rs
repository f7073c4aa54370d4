//! Guest memory: its backing, its KVM slots, its dirty log.
#![allow(unsafe_code)] // Advice on mappings and KVM memory slots take raw addresses.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use devices::GuestMemory;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use migration::PageSet;
use rustix::fs::MemfdFlags;
use thiserror::Error;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::boot::layout;

/// Guest memory could not be made or tracked.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum MemoryError {
    #[error("memory: expected a multiple of {page} bytes, got {0}", page = layout::PAGE_SIZE)]
    NotPages(u64),
    #[error("memory: expected at least {MIN_MEMORY} bytes, got {0}")]
    TooSmall(u64),
    #[error("memory: {got} bytes, but this host has {host}")]
    MoreThanHost { got: u64, host: u64 },
    #[error("memfd of {len} bytes")]
    Memfd { len: u64, source: io::Error },
    #[error("mapping {len} bytes of guest memory")]
    Map { len: u64, source: MmapRegionError },
    #[error("guest memory")]
    Regions(String),
    #[error("KVM_SET_USER_MEMORY_REGION slot {slot}")]
    Slot { slot: u32, source: kvm_ioctls::Error },
    #[error("KVM_GET_DIRTY_LOG slot {slot}")]
    DirtyLog { slot: u32, source: kvm_ioctls::Error },
    #[error("page set")]
    PageSet(#[from] migration::PageSetError),
}

/// Less than this cannot hold the firmware tables and a kernel.
pub const MIN_MEMORY: u64 = 2 << 20;

/// Checks a memory size that somebody asks for against this host.
pub fn check_size(size: u64) -> Result<(), MemoryError> {
    if !size.is_multiple_of(layout::PAGE_SIZE) {
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

/// Zeroed guest memory of the given ranges: anonymous with huge-page advice, or a memfd if `shared`.
pub fn create(ranges: &[(u64, u64)], shared: bool) -> Result<GuestMemory, MemoryError> {
    let regions = ranges
        .iter()
        .map(|(gpa, len)| {
            let mapping = map(*len, shared)?;
            GuestRegionMmap::new(mapping, GuestAddress(*gpa)).ok_or_else(|| {
                MemoryError::Regions(format!(
                    "{len} bytes at {gpa:#x} pass the end of the address space"
                ))
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestMemoryMmap::from_regions(regions).map_err(|error| MemoryError::Regions(error.to_string()))
}

fn map(len: u64, shared: bool) -> Result<MmapRegion<AtomicBitmap>, MemoryError> {
    let page_size = std::num::NonZeroUsize::MIN.saturating_add(layout::PAGE_SIZE as usize - 1);
    let bitmap = AtomicBitmap::new(len as usize, page_size);
    let mut builder = MmapRegionBuilder::new_with_bitmap(len as usize, bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    if shared {
        let wrap = |source: rustix::io::Errno| MemoryError::Memfd {
            len,
            source: source.into(),
        };
        let memfd = rustix::fs::memfd_create("godwit-guest-memory", MemfdFlags::CLOEXEC).map_err(wrap)?;
        rustix::fs::ftruncate(&memfd, len).map_err(wrap)?;
        builder = builder
            .with_file_offset(FileOffset::from_arc(Arc::new(memfd.into()), 0))
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE);
    } else {
        builder = builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    }
    let region = builder
        .build()
        .map_err(|source| MemoryError::Map { len, source })?;
    advise_huge_pages(&region);
    Ok(region)
}

/// Advice only: a kernel without transparent huge pages says no, and 4 KiB pages do as well.
fn advise_huge_pages(region: &MmapRegion<AtomicBitmap>) {
    // SAFETY: the range is one mapping that `region` owns, and MADV_HUGEPAGE does not change its content.
    let advised = unsafe {
        rustix::mm::madvise(
            region.as_ptr().cast(),
            region.size(),
            rustix::mm::Advice::LinuxHugepage,
        )
    };
    if let Err(error) = advised {
        tracing::debug!(%error, "no huge pages for guest memory");
    }
}

/// Gives the memory to the VM: region n becomes slot n.
pub fn register(vm: &VmFd, memory: &GuestMemory) -> Result<(), MemoryError> {
    set_slots(vm, memory, 0)
}

/// Turns KVM's dirty log of all memory on or off.
pub fn set_dirty_log(vm: &VmFd, memory: &GuestMemory, on: bool) -> Result<(), MemoryError> {
    set_slots(vm, memory, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
}

fn set_slots(vm: &VmFd, memory: &GuestMemory, flags: u32) -> Result<(), MemoryError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let kvm_region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a mapping owned by `memory`, which the machine keeps until after the VM is
        // gone: see the field order of `Machine`.
        unsafe { vm.set_user_memory_region(kvm_region) }
            .map_err(|source| MemoryError::Slot { slot, source })?;
    }
    Ok(())
}

/// Adds every page that vCPUs (KVM's log) or devices (the regions' bitmaps) wrote since the last harvest.
pub fn harvest(vm: &VmFd, memory: &GuestMemory, into: &mut PageSet) -> Result<(), MemoryError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let log = vm
            .get_dirty_log(slot, region.len() as usize)
            .map_err(|source| MemoryError::DirtyLog { slot, source })?;
        into.insert_bitmap(slot as usize, &log)?;
        into.insert_bitmap(slot as usize, &device_writes(region))?;
    }
    Ok(())
}

/// Forgets what devices wrote so far: the begin of a migration, whose first round sends everything.
pub fn forget_device_writes(memory: &GuestMemory) {
    for region in memory.iter() {
        device_writes(region);
    }
}

fn device_writes(region: &GuestRegionMmap<AtomicBitmap>) -> Vec<u64> {
    let mapping: &MmapRegion<AtomicBitmap> = region;
    mapping.bitmap().get_and_reset()
}

/// The memfds behind shared memory, in region order; empty for anonymous memory.
pub fn memfds(memory: &GuestMemory) -> Vec<i32> {
    memory
        .iter()
        .filter_map(|region| region.file_offset().map(|file| file.file().as_raw_fd()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn device_writes_are_harvested_once() {
        use vm_memory::Bytes;
        for shared in [false, true] {
            let memory = create(&[(0, 64 << 10)], shared).unwrap();
            memory.write_slice(&[1; 2], GuestAddress(4095)).unwrap();
            let region = memory.iter().next().unwrap();
            assert_eq!(device_writes(region), [0b11]);
            assert_eq!(device_writes(region), [0]);
            assert_eq!(region.file_offset().is_some(), shared);
        }
    }
}
