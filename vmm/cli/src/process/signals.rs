//! Signals that come while a VM is being started.

use vmm_sys_util::signal::{block_signal, register_signal_handler, unblock_signal};

/// Signals that ask a VM to end.
const ENDING: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// A file that becomes longer than this process's limit is an error of the write, not the guest's end.
pub(crate) fn outlive_file_size_limit() {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    if let Err(error) = register_signal_handler(libc::SIGXFSZ, nothing) {
        tracing::warn!(?error, "a file that becomes too long will end the guest");
    }
}

/// A job in the background that reads from its terminal, or prints there, gets an error instead of being stopped: what
/// would stand still is the guest. For this thread and those that it starts.
pub(crate) fn stay_with_the_terminal() {
    for signal in [libc::SIGTTIN, libc::SIGTTOU] {
        // One that is blocked already does the same.
        let _ = block_signal(signal);
    }
}

/// As long as it lives, signals that ask for the end wait. Without it, one that comes before there is a handler
/// ends the process where it stands, with its sockets left behind.
pub(crate) struct HeldSignals(Vec<libc::c_int>);

impl HeldSignals {
    /// Holds them for this thread and those that it starts. Create it before what has to be cleaned up, so that
    /// it is dropped after it.
    pub(crate) fn hold() -> Self {
        // A signal that was blocked already stays so.
        Self(
            ENDING
                .into_iter()
                .filter(|signal| block_signal(*signal).is_ok())
                .collect(),
        )
    }
}

impl Drop for HeldSignals {
    fn drop(&mut self) {
        for signal in &self.0 {
            if let Err(error) = unblock_signal(*signal) {
                tracing::warn!(signal, ?error, "a signal stays blocked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::signal::get_blocked_signals;

    use super::*;

    fn blocked() -> Vec<libc::c_int> {
        let mut blocked = get_blocked_signals().unwrap();
        blocked.retain(|signal| ENDING.contains(signal));
        blocked
    }

    #[test]
    fn only_what_was_not_held_before_is_let_go() {
        let outer = HeldSignals::hold();
        drop(HeldSignals::hold());
        assert_eq!(blocked().len(), ENDING.len());
        drop(outer);
        assert!(blocked().is_empty());
    }
}
