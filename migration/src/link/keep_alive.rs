//! A sign of life while this side is busy with its machine.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::Link;
use crate::protocol::Message;

/// Tells the peer that this side is alive while [`KeepAlive::during`] runs something that takes long. One
/// thread for a whole migration, because starting one costs more than most steps of the downtime.
#[derive(Debug)]
pub(crate) struct KeepAlive {
    state: Mutex<State>,
    changed: Condvar,
    interval: Duration,
}

/// A peer may be less patient than this side is.
const MAX_INTERVAL: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct State {
    /// Whether a step runs, so that the connection's owner is silent.
    busy: bool,
    stop: bool,
}

impl KeepAlive {
    /// Signs of life often enough that a peer with this time-out does not lose patience.
    pub(crate) fn new(io_timeout: Duration) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            interval: (io_timeout / 4).min(MAX_INTERVAL),
        }
    }

    /// How long the connection's owner may be silent.
    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }

    /// Runs a step of this side's own. Nothing else may be sent meanwhile.
    pub(crate) fn during<T>(&self, step: impl FnOnce() -> T) -> T {
        self.lock().busy = true;
        // Also after a panic, else the thread would speak into what the clean-up says.
        let _silence = Silence(self);
        step()
    }

    /// Starts the thread; it ends after [`KeepAlive::stop`].
    pub(crate) fn start<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        mut link: Link<'scope>,
    ) -> io::Result<()> {
        let body = move || self.run(&mut link);
        thread::Builder::new()
            .name("keep-alive".into())
            .spawn_scoped(scope, body)
            .map(|_| ())
    }

    fn run(&self, link: &mut Link<'_>) {
        link.only_send();
        link.ignore_cancel();
        let mut last = Instant::now();
        let mut state = self.lock();
        while !state.stop {
            let waited = self.changed.wait_timeout(state, self.interval / 2);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            // Counted from the last sign of life, not from the start of the step: many short steps in a row
            // are as silent as a long one.
            if state.busy && last.elapsed() >= self.interval {
                // Under the lock: `during` does not return while a frame is half sent. A failure is found by
                // the owner of the connection as well.
                let _ = link.send(&Message::KeepAlive);
                last = Instant::now();
            }
        }
    }

    /// Ends the thread.
    pub(crate) fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Silence<'a>(&'a KeepAlive);

impl Drop for Silence<'_> {
    fn drop(&mut self) {
        self.0.lock().busy = false;
    }
}
