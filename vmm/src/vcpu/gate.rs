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
    /// The machine is being put in files, or was.
    Snapshot = 8,
}

/// What a vCPU thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextStep {
    /// Enter the guest.
    Enter,
    /// End the thread.
    End,
}

/// Counts the holders and the threads that are parked because of them, or for a slice of time.
///
/// A slice keeps one vCPU out until it is over. It is nobody's hold: it opens nothing, it delays neither a
/// pause, for which a thread in a slice is parked like any other, nor whoever waits for the end of a pause.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug)]
struct GateState {
    holders: u8,
    ending: bool,
    /// Threads that are parked because of a holder.
    held: usize,
    /// How often those were woken to see how long that takes, and how many have not been awake since.
    rousings: u64,
    asleep: usize,
    /// Threads that will not come back.
    retired: usize,
    vcpus: Vec<Slices>,
}

/// What slices do to one vCPU.
#[derive(Clone, Copy, Debug, Default)]
struct Slices {
    /// When the present slice ends.
    until: Option<Instant>,
    /// Since when its thread is parked for it.
    since: Option<Instant>,
    /// How long it was parked for those before.
    parked: Duration,
}

impl Gate {
    /// A gate for `threads` vCPU threads, held by [`Holder::Startup`].
    pub fn new(threads: usize) -> Self {
        let state = GateState {
            holders: Holder::Startup as u8,
            ending: false,
            held: 0,
            rousings: 0,
            asleep: 0,
            retired: 0,
            vcpus: vec![Slices::default(); threads],
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

    /// Closes the gate for `holder`, lets `kick` get the threads out of the guest, and waits until every one is parked. If
    /// that is not so after `timeout`, it is false, and `holder` holds the gate no more than before.
    pub(super) fn hold(&self, holder: Holder, kick: impl FnOnce(), timeout: Duration) -> bool {
        let held_before = self.held_by(holder);
        self.close(holder);
        kick();
        let parked = self.wait_parked(timeout);
        if !parked && !held_before {
            self.open(holder);
        }
        parked
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

    /// Keeps vCPU `id` out until `until`. Kick it. Says no where the gate is closed: who is out already needs
    /// no slice.
    pub(super) fn begin_slice(&self, id: usize, until: Instant) -> bool {
        let mut state = self.lock();
        let open = state.holders == 0;
        if let Some(vcpu) = state.vcpus.get_mut(id).filter(|_| open) {
            vcpu.until = Some(until);
        }
        open
    }

    /// Ends every slice at once.
    pub(super) fn end_slices(&self) {
        for vcpu in &mut self.lock().vcpus {
            vcpu.until = None;
        }
        self.changed.notify_all();
    }

    /// How long each vCPU has been parked for slices, up to `now`.
    pub(crate) fn sliced(&self, now: Instant) -> Vec<Duration> {
        let so_far = |vcpu: &Slices| {
            let present = vcpu
                .since
                .map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
            vcpu.parked + present
        };
        self.lock().vcpus.iter().map(so_far).collect()
    }

    /// Sends all threads home, closed or not. Kick those in the guest.
    pub fn end(&self) {
        self.lock().ending = true;
        self.changed.notify_all();
    }

    /// A vCPU thread that will not come back, because it failed, counts as parked for ever.
    pub fn retire(&self) {
        self.lock().retired += 1;
        self.changed.notify_all();
    }

    /// Whether a vCPU thread will not come back.
    pub fn has_retired(&self) -> bool {
        self.lock().retired > 0
    }

    /// Called by the thread of vCPU `id` outside the guest: waits while the gate is closed or its slice lasts.
    pub fn pass(&self, id: usize) -> NextStep {
        let mut state = self.lock();
        loop {
            if state.ending {
                return NextStep::End;
            }
            if state.holders != 0 {
                state.held += 1;
                self.changed.notify_all();
                let rousings = state.rousings;
                let sleeps =
                    |state: &mut GateState| state.holders != 0 && !state.ending && state.rousings == rousings;
                state = self
                    .changed
                    .wait_while(state, sleeps)
                    .unwrap_or_else(PoisonError::into_inner);
                state.held -= 1;
                if state.rousings != rousings {
                    state.asleep = state.asleep.saturating_sub(1);
                }
                self.changed.notify_all();
            } else if let Some(left) = state.slice_left(id) {
                state = self.sit_out(state, id, left);
            } else {
                return NextStep::Enter;
            }
        }
    }

    /// Parks for what is left of a slice. Also returns when something changes.
    fn sit_out<'a>(
        &self,
        mut state: MutexGuard<'a, GateState>,
        id: usize,
        left: Duration,
    ) -> MutexGuard<'a, GateState> {
        let began = Instant::now();
        state.vcpus[id].since = Some(began);
        let (mut state, _) = self
            .changed
            .wait_timeout(state, left)
            .unwrap_or_else(PoisonError::into_inner);
        let vcpu = &mut state.vcpus[id];
        vcpu.since = None;
        vcpu.parked += began.elapsed();
        state
    }

    /// Waits until every thread is parked; false after `timeout`.
    pub fn wait_parked(&self, timeout: Duration) -> bool {
        self.wait(timeout, |state| {
            let in_slices = state.vcpus.iter().filter(|vcpu| vcpu.since.is_some()).count();
            state.held + state.retired + in_slices == state.vcpus.len()
        })
    }

    /// Waits until nobody keeps a thread from the guest any more (but for its slices), or the gate is closed
    /// again; false after `timeout`.
    pub fn wait_entered(&self, timeout: Duration) -> bool {
        self.wait(timeout, |state| state.held == 0 || state.holders != 0)
    }

    /// Wakes every thread that is parked because of a holder, and waits until each was awake; they park again. False
    /// after `timeout`.
    pub fn rouse(&self, timeout: Duration) -> bool {
        let mut state = self.lock();
        state.rousings += 1;
        state.asleep = state.held;
        drop(state);
        self.changed.notify_all();
        self.wait(timeout, |state| state.asleep == 0)
    }

    fn wait(&self, timeout: Duration, done: impl Fn(&GateState) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let left = deadline.saturating_duration_since(Instant::now());
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), left, |state| !done(state))
            .unwrap_or_else(PoisonError::into_inner);
        done(&state)
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        // No code panics while it holds the lock; if it did, the counters would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GateState {
    /// What is left of a vCPU's slice, if it has one.
    fn slice_left(&self, id: usize) -> Option<Duration> {
        let until = self.vcpus.get(id)?.until?;
        let left = until.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    /// A gate before which two vCPUs wait.
    fn two_parked() -> (Arc<Gate>, Vec<thread::JoinHandle<NextStep>>) {
        let gate = Arc::new(Gate::new(2));
        let threads = (0..2)
            .map(|id| {
                let gate = gate.clone();
                thread::spawn(move || gate.pass(id))
            })
            .collect();
        assert!(gate.wait_parked(Duration::from_secs(5)));
        (gate, threads)
    }

    #[test]
    fn opens_only_when_the_last_holder_lets_go() {
        let (gate, threads) = two_parked();
        gate.close(Holder::User);
        gate.open(Holder::Startup);
        assert!(gate.held_by(Holder::User) && !gate.held_by(Holder::Startup));
        assert!(gate.wait_parked(Duration::from_secs(5)));
        gate.open(Holder::User);
        for thread in threads {
            assert_eq!(thread.join().unwrap(), NextStep::Enter);
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
    fn a_hold_that_fails_holds_nobody() {
        let gate = Gate::new(1);
        gate.open(Holder::Startup);
        // Its thread is in the guest, and stays there.
        assert!(!gate.hold(Holder::User, || {}, Duration::ZERO));
        assert!(!gate.is_closed());
        gate.close(Holder::User);
        assert!(!gate.hold(Holder::User, || {}, Duration::ZERO));
        assert!(gate.held_by(Holder::User), "it was held before");
    }

    #[test]
    fn end_frees_parked_threads() {
        let gate = Arc::new(Gate::new(1));
        let thread = thread::spawn({
            let gate = gate.clone();
            move || gate.pass(0)
        });
        assert!(gate.wait_parked(Duration::from_secs(5)));
        gate.end();
        assert_eq!(thread.join().unwrap(), NextStep::End);
    }
    #[test]
    fn a_vcpu_in_a_slice_is_parked_for_a_pause_and_no_slice_opens_the_gate() {
        let gate = Arc::new(Gate::new(1));
        gate.open(Holder::Startup);
        assert!(gate.begin_slice(0, Instant::now() + Duration::from_secs(3600)));
        let thread = thread::spawn({
            let gate = gate.clone();
            move || gate.pass(0)
        });
        assert!(gate.wait_parked(Duration::from_secs(5)));
        gate.close(Holder::Migration);
        assert!(gate.wait_parked(Duration::ZERO));
        assert!(
            !gate.begin_slice(0, Instant::now()),
            "a slice for a vCPU that is held"
        );
        gate.end_slices();
        assert!(gate.wait_parked(Duration::from_secs(5)) && !thread.is_finished());
        gate.open(Holder::Migration);
        assert_eq!(thread.join().unwrap(), NextStep::Enter);
        assert!(gate.sliced(Instant::now())[0] > Duration::ZERO);
    }

    #[test]
    fn the_end_of_a_pause_does_not_wait_for_slices() {
        let gate = Arc::new(Gate::new(1));
        gate.open(Holder::Startup);
        gate.begin_slice(0, Instant::now() + Duration::from_secs(3600));
        gate.close(Holder::User);
        let thread = thread::spawn({
            let gate = gate.clone();
            move || gate.pass(0)
        });
        assert!(gate.wait_parked(Duration::from_secs(5)));
        gate.open(Holder::User);
        assert!(gate.wait_entered(Duration::from_secs(5)) && !thread.is_finished());
        gate.end_slices();
        assert_eq!(thread.join().unwrap(), NextStep::Enter);
    }

    #[test]
    fn who_is_roused_parks_again() {
        let (gate, threads) = two_parked();
        for _ in 0..100 {
            assert!(gate.rouse(Duration::from_secs(5)));
            assert!(gate.wait_parked(Duration::from_secs(5)));
        }
        assert!(threads.iter().all(|thread| !thread.is_finished()));
        gate.open(Holder::Startup);
        for thread in threads {
            assert_eq!(thread.join().unwrap(), NextStep::Enter);
        }
        assert!(gate.rouse(Duration::ZERO), "nobody is parked");
    }

    #[test]
    fn a_slice_ends_by_itself() {
        let gate = Gate::new(1);
        gate.open(Holder::Startup);
        let until = Instant::now() + Duration::from_millis(2);
        gate.begin_slice(0, until);
        assert_eq!(gate.pass(0), NextStep::Enter);
        assert!(Instant::now() >= until);
    }
}
