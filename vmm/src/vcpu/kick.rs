//! Getting a vCPU thread out of `KVM_RUN`.
//!
//! A signal alone can arrive just before the ioctl and be lost. So its handler sets `immediate_exit` in the
//! `kvm_run` page of its own thread (Documentation/virt/kvm/api.rst, 5): the next `KVM_RUN` finishes what was
//! pending and returns EINTR at once.
#![allow(unsafe_code)] // A signal handler that writes through a pointer to the shared kvm_run page.

use std::cell::Cell;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that kicks a vCPU thread.
pub(super) fn signal() -> libc::c_int {
    SIGRTMIN()
}

/// Installs the handler, for the whole process.
pub(super) fn install_handler() -> Result<(), vmm_sys_util::errno::Error> {
    register_signal_handler(signal(), on_kick)
}

/// As long as it lives, kicks to this thread reach this vCPU, which lives as long.
pub(super) struct Kickable {
    _vcpu: Arc<Mutex<VcpuFd>>,
}

impl Kickable {
    pub(super) fn new(vcpu: Arc<Mutex<VcpuFd>>) -> Self {
        let run: *mut kvm_run = vcpu.lock().unwrap_or_else(PoisonError::into_inner).get_kvm_run();
        KVM_RUN.set(run);
        Kickable { _vcpu: vcpu }
    }
}

/// How many bytes each access has of the port I/O for which this thread's vCPU has just left the guest: several come at once
/// (`rep outsb`), one after the other at the same port.
pub(super) fn port_access_size() -> usize {
    let run = KVM_RUN.get();
    if run.is_null() {
        return 1;
    }
    // SAFETY: `Kickable` keeps the pointer valid while it is not null. For this exit the kernel has filled the union's
    // `io` variant, and any bit pattern is a valid u8. The data of the access lie in another page.
    let size = unsafe { ptr::read_volatile(&raw const (*run).__bindgen_anon_1.io.size) };
    usize::from(size.max(1))
}

impl Drop for Kickable {
    fn drop(&mut self) {
        KVM_RUN.set(ptr::null_mut());
    }
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // A thread at its end has no thread-locals any more, and no vCPU to kick either.
    let run = KVM_RUN.try_with(Cell::get).unwrap_or(ptr::null_mut());
    if !run.is_null() {
        // SAFETY: `Kickable` has the vCPU, and with it the mapping, while the pointer is not null. The byte is shared with the
        // kernel only, and with this thread's own code, which the handler interrupts.
        unsafe { ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
    }
}
