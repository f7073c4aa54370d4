//! Getting a vCPU thread out of `KVM_RUN`.
//!
//! A signal alone can arrive just before the ioctl and be lost. So its handler sets `immediate_exit` in the
//! `kvm_run` page of its own thread (Documentation/virt/kvm/api.rst, 5): the next `KVM_RUN` finishes what was
//! pending and returns EINTR at once.
#![allow(unsafe_code)] // A signal handler that writes through a pointer to the shared kvm_run page.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use threads::Thread;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

thread_local! {
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// Installs the handler, for the whole process.
pub(super) fn install_handler() -> Result<(), vmm_sys_util::errno::Error> {
    register_signal_handler(SIGRTMIN(), on_kick)
}

/// The threads of a machine's vCPUs, in order of ids.
///
/// The thread that kicks all of them may lose its processor to those that it has kicked, and the others would stay in the guest
/// meanwhile. So each thread that leaves the guest goes on with the kicks that are left.
#[derive(Default)]
pub(super) struct VcpuThreads {
    /// Many may read it at a time: a thread that loses its processor in the middle of a kick delays no other kick.
    threads: RwLock<Vec<Thread>>,
    /// So many of them, from the first on, are still to be kicked.
    left: AtomicUsize,
}

impl VcpuThreads {
    /// Adds the next vCPU's.
    pub(super) fn push(&self, thread: Thread) {
        self.threads
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(thread);
    }

    /// Kicks the thread of vCPU `id`.
    pub(super) fn kick(&self, id: usize) {
        self.read().get(id).into_iter().for_each(kick);
    }

    /// Kicks all. One kick is enough: it comes after a change of the gate, and a thread looks at the gate after every
    /// kick and before it enters the guest.
    pub(super) fn kick_all(&self) {
        let all = self.read().len();
        self.left.store(all, Ordering::SeqCst);
        self.kick_rest();
    }

    /// Kicks those that are left of all, if somebody is about to kick all.
    pub(super) fn kick_rest(&self) {
        let threads = self.read();
        let take_one = |left: usize| left.checked_sub(1);
        while let Ok(left) = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take_one)
        {
            threads.get(left - 1).into_iter().for_each(kick);
        }
    }

    /// Takes all out, to wait for their ends.
    pub(super) fn take(&self) -> Vec<Thread> {
        std::mem::take(&mut *self.threads.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<Thread>> {
        self.threads.read().unwrap_or_else(PoisonError::into_inner)
    }
}

fn kick(thread: &Thread) {
    // Fails only for a thread that has ended, which needs no kick.
    let _ = thread.kill(SIGRTMIN());
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

#[cfg(test)]
mod tests {
    use crate::vcpu::tests::vcpus_that_wait;
    use crate::vcpu::{Holder, PARK_TIMEOUT};

    use super::*;

    #[test]
    fn a_thread_that_leaves_the_guest_kicks_those_that_are_left() {
        let Some(set) = vcpus_that_wait(4) else { return };
        set.resume(Holder::Startup);
        set.gate().close(Holder::User);
        // The thread that kicks all has lost its processor after the first of them.
        set.threads.left.store(3, Ordering::SeqCst);
        set.threads.kick(3);
        assert!(set.gate().wait_parked(PARK_TIMEOUT));
        assert_eq!(set.threads.left.load(Ordering::SeqCst), 0);
    }
}
