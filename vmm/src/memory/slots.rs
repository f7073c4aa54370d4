//! KVM's memory slots: region n is slot n.
#![allow(unsafe_code)] // KVM memory slots take raw addresses.

use devices::GuestMemory;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::MemoryError;

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
        // SAFETY: the range is a mapping owned by `memory`. The machine and its dirty logs have the VM and the memory,
        // and drop the memory later: see the order of their fields, and of the parameters of `Machine::build`.
        unsafe { vm.set_user_memory_region(kvm_region) }
            .map_err(|source| MemoryError::Slot { slot, source })?;
    }
    Ok(())
}
