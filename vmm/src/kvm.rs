//! What kvm-ioctls does not offer: a vCPU's TSC offset and the reason of an internal error.
#![allow(unsafe_code)] // ioctls of our own and a union of the kernel's.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{errno, ioctl_iow_nr};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// The vCPU's TSC offset: guest TSC = host TSC + offset, modulo 2^64
/// (Documentation/virt/kvm/devices/vcpu.rst, 4.1).
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, errno::Error> {
    let mut offset = 0u64;
    let attribute = tsc_attribute(&raw mut offset as u64);
    // SAFETY: the kernel writes eight bytes to `offset`, which lives until after the call.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    if result == 0 {
        Ok(offset)
    } else {
        Err(errno::Error::last())
    }
}

/// Sets the vCPU's TSC offset.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), errno::Error> {
    let attribute = tsc_attribute(&raw const offset as u64);
    // SAFETY: the kernel reads eight bytes from `offset`, which lives until after the call.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) };
    if result == 0 {
        Ok(())
    } else {
        Err(errno::Error::last())
    }
}

/// This CPU's time-stamp counter.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux lets user space use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The suberror of the `KVM_EXIT_INTERNAL_ERROR` that `KVM_RUN` just returned.
pub(crate) fn internal_suberror(vcpu: &mut VcpuFd) -> u32 {
    // SAFETY: for this exit reason the kernel has filled the union's `internal` variant, and any bit
    // pattern is a valid u32 anyway.
    unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror }
}

fn tsc_attribute(addr: u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr,
    }
}
