//! Sends keep-alives, whatever this side is busy with.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use threads::Role;

use super::writer::Pulse;

/// Sends a keep-alive whenever nothing else was sent for a while. One thread for a whole migration, which knows nothing
/// of its phases: the peer decides how long a step may take.
#[derive(Debug)]
pub(crate) struct KeepAlive {
    stopped: Mutex<bool>,
    changed: Condvar,
    interval: Duration,
}

/// The longest interval: the peer's time-out may be shorter than this side's.
const MAX_INTERVAL: Duration = Duration::from_secs(2);

impl KeepAlive {
    /// Sends often enough for a peer with this time-out.
    pub(crate) fn new(io_timeout: Duration) -> Self {
        Self {
            stopped: Mutex::new(false),
            changed: Condvar::new(),
            interval: (io_timeout / 4).min(MAX_INTERVAL),
        }
    }

    /// Starts the thread; it ends after [`KeepAlive::stop`].
    pub(crate) fn start<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        pulse: Pulse<'scope>,
    ) -> io::Result<()> {
        threads::spawn_scoped(scope, Role::Control, "keep-alive", move || self.run(&pulse)).map(|_| ())
    }

    fn run(&self, pulse: &Pulse<'_>) {
        let mut stopped = self.lock();
        while !*stopped {
            // Under the lock, so that nothing is sent after a stop; it never waits.
            let again = pulse.send_if_idle(self.interval);
            let waited = self.changed.wait_timeout(stopped, again);
            stopped = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the thread. Nothing more is sent by it from here on.
    pub(crate) fn stop(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
