//! The end of a VM whose memory is lost: a page that is mapped from a snapshot's file is not there any more, as the
//! file has become shorter or its disk fails, or the host's memory is broken. A thread that touches such a page gets
//! SIGBUS, and cannot go on.
#![allow(unsafe_code)] // A signal handler.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm::memory;
use vmm_sys_util::signal::register_signal_handler;

use super::terminal::restore_at_once;

const LOST: &str = "godwit: a page of the guest's memory is lost: the snapshot's file that it was mapped from has become \
                    shorter, or its disk fails\n";
const BROKEN: &str = "godwit: a page of the guest's memory is lost: the host's memory is broken there\n";

/// Has the VM end with a message, status 1 and the terminal as it was, and not by a signal.
pub(crate) fn end_in_order() {
    if let Err(error) = register_signal_handler(libc::SIGBUS, on_bus_error) {
        tracing::warn!(
            ?error,
            "a page of guest memory that is lost will end the VM without a message"
        );
    }
}

/// Calls nothing but what a signal handler may: any thread may hold any lock.
extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a whole siginfo to a handler that was registered with SA_SIGINFO.
    let (address, code) = unsafe { ((*info).si_addr() as usize, (*info).si_code) };
    if code <= 0 || !memory::is_guest_memory(address) {
        // Not guest memory: restores the default action. The signal is blocked until this handler returns.
        // SAFETY: both calls are allowed in a signal handler and touch no memory of ours.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    }
    restore_at_once();
    let line = if code == libc::BUS_MCEERR_AR || code == libc::BUS_MCEERR_AO {
        BROKEN
    } else {
        LOST
    };
    // A reader who does not read must not keep the process.
    let stderr = rustix::stdio::stderr();
    let mut ready = [PollFd::from_borrowed_fd(stderr, PollFlags::OUT)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    if poll(&mut ready, Some(&now)).is_ok_and(|count| count > 0) {
        let _ = rustix::io::write(stderr, line.as_bytes());
    }
    // SAFETY: ends the process at once; no destructor runs that could wait for a lock or touch the page again.
    unsafe { libc::_exit(crate::Exit::Failed as i32) }
}
