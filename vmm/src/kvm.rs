//! What kvm-ioctls does not offer: clearing the dirty log, dirty rings, a VM's TSC frequency, a vCPU's TSC offset, the
//! reason of an internal error.
#![allow(unsafe_code)] // ioctls of our own and a union of the kernel's.

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_device_attr, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
    kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{errno, ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_io_nr!(KVM_GET_TSC_KHZ, KVMIO, 0xa3);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Both features of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (api.rst, 7.11): reading the log clears nothing, and a
/// new log has every page marked, so that to start it costs nothing.
const MANUAL_PROTECT: u32 = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;

/// Whether KVM has both features of manual protection: since Linux 5.7.
pub(crate) fn has_manual_protect(vm: &VmFd) -> bool {
    let features = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    features > 0 && features as u32 & MANUAL_PROTECT == MANUAL_PROTECT
}

/// Turns both features of manual protection on.
pub(crate) fn enable_manual_protect(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [MANUAL_PROTECT.into(), 0, 0, 0],
        ..Default::default()
    })
}

/// The size in bytes of the largest dirty ring, where KVM has them (api.rst, 8.29).
pub(crate) fn max_dirty_ring(vm: &VmFd) -> Option<usize> {
    let bytes = vm.check_extension_raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL.into());
    usize::try_from(bytes).ok().filter(|bytes| *bytes > 0)
}

/// Gives each vCPU that is created from now on a dirty ring of `bytes`.
pub(crate) fn enable_dirty_ring(vm: &VmFd, bytes: u64) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
        args: [bytes, 0, 0, 0],
        ..Default::default()
    })
}

/// Protects the pages of entries that were collected from dirty rings, and frees the entries. Returns how many.
///
/// KVM breaks off, and forgets to protect the last few pages, when a signal is pending for the calling thread; so
/// none is let through meanwhile. A kick comes right afterwards.
pub(crate) fn reset_dirty_rings(vm: &VmFd) -> Result<usize, errno::Error> {
    // SAFETY: a signal set is plain data, which sigfillset and pthread_sigmask fill before it is read; the
    // ioctl has no argument.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let reset = ioctl(vm, KVM_RESET_DIRTY_RINGS());
        let failed = errno::Error::last();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        usize::try_from(reset).map_err(|_| failed)
    }
}

/// KVM_GET_DIRTY_LOG under manual protection: the marks of a slot, which stay.
///
/// # Safety
///
/// `bitmap` has a bit for every page of the slot, rounded up to whole words.
pub(crate) unsafe fn dirty_log(vm: &VmFd, slot: u32, bitmap: &mut [u64]) -> Result<(), errno::Error> {
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bitmap.as_mut_ptr().cast(),
        },
    };
    // SAFETY: the kernel writes as many bits as the slot has pages, rounded up to 64, which the caller has
    // room for.
    errno_of(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) })
}

/// KVM_CLEAR_DIRTY_LOG: clears the marks whose bits are set in `bitmap`, whose first bit is page `first_page`
/// of the slot, and protects these pages, so that the next write marks again. `first_page` is a multiple of
/// 64; `pages` is as well, or ends at the slot's end. Fails with EINVAL where `bitmap` is too short for
/// `pages`.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    bitmap: &[u64],
) -> Result<(), errno::Error> {
    if (pages as usize).div_ceil(64) > bitmap.len() {
        return Err(errno::Error::new(libc::EINVAL));
    }
    let mut log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bitmap.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the kernel reads `pages` bits, rounded up to 64, from `bitmap`, which has them.
    errno_of(unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut log) })
}

/// The TSC frequency that vCPUs of the VM begin with, in kHz. A kernel that reports it has TSC offsets as well, which
/// came one version earlier.
pub(crate) fn tsc_khz(vm: &VmFd) -> Result<u32, errno::Error> {
    // SAFETY: the ioctl has no argument.
    let khz = unsafe { ioctl(vm, KVM_GET_TSC_KHZ()) };
    u32::try_from(khz).map_err(|_| errno::Error::last())
}

/// The vCPU's TSC offset: guest TSC = host TSC + offset, modulo 2^64
/// (Documentation/virt/kvm/devices/vcpu.rst, 4.1).
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, errno::Error> {
    let mut offset = 0u64;
    let attribute = tsc_attribute(&raw mut offset as u64);
    // SAFETY: the kernel writes eight bytes to `offset`, which lives until after the call.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    errno_of(result).map(|()| offset)
}

/// Sets the vCPU's TSC offset.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), errno::Error> {
    let attribute = tsc_attribute(&raw const offset as u64);
    // SAFETY: the kernel reads eight bytes from `offset`, which lives until after the call.
    errno_of(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })
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

fn errno_of(result: i32) -> Result<(), errno::Error> {
    if result == 0 {
        Ok(())
    } else {
        Err(errno::Error::last())
    }
}
