//! The dirty log by KVM's bitmaps under manual protection.
#![allow(unsafe_code)] // The kernel writes a slot's bitmap to a buffer of this process.

use std::sync::{Arc, Mutex, PoisonError};

use devices::GuestMemory;
use kvm_ioctls::VmFd;
use migration::{DirtyLog, PageSet, PortError};
use vm_memory::GuestMemoryBackend;

use super::MemoryError;
use super::marks::{MarkedWords, add_device_writes, pages};
use crate::kvm;

/// KVM's bitmaps and those of devices. Its calls fail while logging is off.
pub struct BitmapLog {
    // In this order: memory outlives the VM whose slots it is.
    vm: Arc<VmFd>,
    memory: GuestMemory,
    /// Room for one slot's bitmap. KVM serialises calls as well, so to wait for it costs nothing.
    scratch: Mutex<Vec<u64>>,
}

impl BitmapLog {
    /// The log of a VM that has `memory` as its slots, see [`super::register`].
    pub fn new(vm: Arc<VmFd>, memory: GuestMemory) -> Self {
        Self {
            vm,
            memory,
            scratch: Mutex::default(),
        }
    }

    fn add_marks(&self, into: &mut PageSet) -> Result<(), MemoryError> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        for (slot, region) in (0u32..).zip(self.memory.iter()) {
            scratch.resize(pages(region).div_ceil(64) as usize, 0);
            // SAFETY: the slot is this region, and the buffer has a bit for each of its pages.
            unsafe { kvm::dirty_log(&self.vm, slot, &mut scratch) }
                .map_err(|cause| MemoryError::DirtyLog { slot, cause })?;
            into.insert_bitmap(slot as usize, &scratch)?;
            add_device_writes(slot as usize, region, into)?;
        }
        Ok(())
    }

    fn clear_marks(&self, marked: MarkedWords<'_>) -> Result<(), MemoryError> {
        if marked.is_empty() {
            return Ok(());
        }
        let MarkedWords {
            slot,
            first,
            pages,
            words,
            ..
        } = marked;
        kvm::clear_dirty_log(&self.vm, slot, first, pages, words).map_err(|cause| {
            MemoryError::ClearDirtyLog {
                slot,
                first,
                pages: pages.into(),
                cause,
            }
        })?;
        marked.clear_device_writes();
        Ok(())
    }
}

impl DirtyLog for BitmapLog {
    fn peek(&self, into: &mut PageSet) -> Result<(), PortError> {
        Ok(self.add_marks(into)?)
    }

    fn clear(&self, region: usize, first: u64, words: &[u64]) -> Result<(), PortError> {
        Ok(self.clear_marks(MarkedWords::new(&self.memory, region, first, words)?)?)
    }

    fn by_vcpu(&self) -> Vec<u64> {
        Vec::new()
    }
}
