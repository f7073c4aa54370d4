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
    /// Since when this side is silent; `None` while the connection is used by its owner.
    silent_since: Option<Instant>,
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

    /// Runs a step of this side's own. Nothing else may be sent meanwhile.
    pub(crate) fn during<T>(&self, step: impl FnOnce() -> T) -> T {
        self.lock().silent_since = Some(Instant::now());
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
        let mut state = self.lock();
        while !state.stop {
            let waited = self.changed.wait_timeout(state, self.interval);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state
                .silent_since
                .is_some_and(|since| since.elapsed() >= self.interval)
            {
                // Under the lock: `during` does not return while a frame is half sent. A failure is found by
                // the owner of the connection as well.
                let _ = link.send(&Message::KeepAlive);
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
        self.0.lock().silent_since = None;
    }
}
