//! The gate between vCPU threads and the guest: closed as long as anybody holds it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Who can hold the gate closed. Each opens it for himself only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// The machine is not started yet.
    Startup = 1,
    /// Somebody asked for a pause.
    User = 2,
    /// A migration's stop-and-copy, or its aftermath.
    Migration = 4,
}

/// What a vCPU thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Enter the guest.
    Enter,
    /// End the thread.
    End,
}

/// Counts the holders and the threads that are parked because of them.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    holders: u8,
    ending: bool,
    threads: usize,
    parked: usize,
    /// Those among the parked that will not come back.
    retired: usize,
}

impl Gate {
    /// A gate for `threads` vCPU threads, held by [`Holder::Startup`].
    pub fn new(threads: usize) -> Self {
        let state = State {
            holders: Holder::Startup as u8,
            ending: false,
            threads,
            parked: 0,
            retired: 0,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Closes the gate for `holder`. Threads in the guest do not notice: kick them.
    pub fn close(&self, holder: Holder) {
        self.lock().holders |= holder as u8;
    }

    /// Takes `holder` off. The threads go on if nobody else holds the gate.
    pub fn open(&self, holder: Holder) {
        self.lock().holders &= !(holder as u8);
        self.changed.notify_all();
    }

    /// Whether `holder` holds the gate.
    pub fn held_by(&self, holder: Holder) -> bool {
        self.lock().holders & holder as u8 != 0
    }

    /// Whether anybody holds the gate.
    pub fn is_closed(&self) -> bool {
        self.lock().holders != 0
    }

    /// Sends all threads home, closed or not. Kick those in the guest.
    pub fn end(&self) {
        self.lock().ending = true;
        self.changed.notify_all();
    }

    /// A vCPU thread that will not come back, because it failed, counts as parked for ever.
    pub fn retire(&self) {
        let mut state = self.lock();
        state.parked += 1;
        state.retired += 1;
        drop(state);
        self.changed.notify_all();
    }

    /// Whether a vCPU thread will not come back.
    pub fn has_retired(&self) -> bool {
        self.lock().retired > 0
    }

    /// Called by vCPU threads outside the guest: waits while the gate is closed.
    pub fn pass(&self) -> Next {
        let mut state = self.lock();
        if state.holders != 0 && !state.ending {
            state.parked += 1;
            self.changed.notify_all();
            state = self
                .changed
                .wait_while(state, |state| state.holders != 0 && !state.ending)
                .unwrap_or_else(PoisonError::into_inner);
            state.parked -= 1;
            self.changed.notify_all();
        }
        if state.ending { Next::End } else { Next::Enter }
    }

    /// Waits until every thread is parked; false after `timeout`.
    pub fn wait_parked(&self, timeout: Duration) -> bool {
        self.wait(timeout, |state| state.parked == state.threads)
    }

    /// Waits until every thread that can has left the gate for the guest, or the gate is closed again; false
    /// after `timeout`.
    pub fn wait_entered(&self, timeout: Duration) -> bool {
        self.wait(timeout, |state| {
            state.parked == state.retired || state.holders != 0
        })
    }

    fn wait(&self, timeout: Duration, done: impl Fn(&State) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let left = deadline.saturating_duration_since(Instant::now());
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), left, |state| !done(state))
            .unwrap_or_else(PoisonError::into_inner);
        done(&state)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; if it did, the counters would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn opens_only_when_the_last_holder_lets_go() {
        let gate = Arc::new(Gate::new(2));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let gate = gate.clone();
                thread::spawn(move || gate.pass())
            })
            .collect();
        assert!(gate.wait_parked(Duration::from_secs(5)));
        gate.close(Holder::User);
        gate.open(Holder::Startup);
        assert!(gate.held_by(Holder::User) && !gate.held_by(Holder::Startup));
        assert!(gate.wait_parked(Duration::from_secs(5)));
        gate.open(Holder::User);
        for thread in threads {
            assert_eq!(thread.join().unwrap(), Next::Enter);
        }
        assert!(gate.wait_entered(Duration::from_secs(5)));
    }

    #[test]
    fn a_retired_thread_holds_up_neither_pause_nor_resume() {
        let gate = Gate::new(1);
        gate.retire();
        assert!(gate.wait_parked(Duration::ZERO));
        gate.open(Holder::Startup);
        assert!(gate.wait_entered(Duration::ZERO));
    }

    #[test]
    fn end_frees_parked_threads() {
        let gate = Arc::new(Gate::new(1));
        let thread = thread::spawn({
            let gate = gate.clone();
            move || gate.pass()
        });
        assert!(gate.wait_parked(Duration::from_secs(5)));
        gate.end();
        assert_eq!(thread.join().unwrap(), Next::End);
    }
}
