//! The gate between vCPU threads and the guest: closed as long as any holder holds it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What can hold the gate closed. Each holder takes only its own hold off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// The machine is not started yet.
    Startup = 1,
    /// A user asked for a pause.
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
/// A slice keeps one vCPU out until it is over. It is no hold: it opens nothing, it delays neither a
/// pause, for which a thread in a slice is parked like any other, nor the wait for the end of a pause.
///
/// Threads that are parked for a holder, those in slices and those that wait for vCPU threads are woken apart, and only
/// when what they wait for may have come: with 32 vCPUs a pause wakes no thread in vain.
pub struct Gate {
    state: Mutex<GateState>,
    /// Wakes threads that are parked because of a holder: no holder is left, there is a task, or the threads are to end.
    held_threads: Condvar,
    /// Wakes threads that are parked for slices: those have ended, or the threads are to end.
    sliced_threads: Condvar,
    /// Wakes threads that wait for vCPU threads: all are parked, the last has left, or one has done its task.
    waiters: Condvar,
}

/// What parked threads do, each of which passes its vCPU's number.
pub(super) type ParkedTask = Arc<dyn Fn(usize) + Send + Sync>;

struct GateState {
    holders: u8,
    ending: bool,
    /// Threads that are parked because of a holder.
    held: usize,
    /// The number of tasks so far, the present one, how many more threads are to begin with it, and how many are to end
    /// with it.
    tasks: u64,
    task: Option<ParkedTask>,
    wanted: usize,
    pending: usize,
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
            tasks: 0,
            task: None,
            wanted: 0,
            pending: 0,
            retired: 0,
            vcpus: vec![Slices::default(); threads],
        };
        Self {
            state: Mutex::new(state),
            held_threads: Condvar::new(),
            sliced_threads: Condvar::new(),
            waiters: Condvar::new(),
        }
    }

    /// Closes the gate for `holder`. Threads in the guest do not notice: kick them.
    pub fn close(&self, holder: Holder) {
        self.lock().holders |= holder as u8;
        // A wait for the end of a pause ends when another begins.
        self.waiters.notify_all();
    }

    /// Closes the gate for `holder`, lets `kick` get the threads out of the guest, and waits until every one is parked.
    /// If that is not so after `timeout`, it is false, and `holder` holds the gate no more than before.
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

    /// Takes `holder` off. The threads go on if no other holder is left.
    pub fn open(&self, holder: Holder) {
        let mut state = self.lock();
        state.holders &= !(holder as u8);
        if state.holders == 0 {
            self.held_threads.notify_all();
        }
    }

    /// Whether `holder` holds the gate.
    pub fn held_by(&self, holder: Holder) -> bool {
        self.lock().holders & holder as u8 != 0
    }

    /// Whether any holder holds the gate.
    pub fn is_closed(&self) -> bool {
        self.lock().holders != 0
    }

    /// Keeps vCPU `id` out until `until`. Kick it. Answers no where the gate is closed: a vCPU that is out already
    /// needs no slice.
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
        self.sliced_threads.notify_all();
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

    /// Ends all threads, whether the gate is closed or not. Kick those in the guest.
    pub fn end(&self) {
        self.lock().ending = true;
        self.held_threads.notify_all();
        self.sliced_threads.notify_all();
    }

    /// A vCPU thread that will not come back, because it failed, counts as parked for ever.
    pub fn retire(&self) {
        self.lock().retired += 1;
        self.waiters.notify_all();
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
                state = self.wait_held(state, id);
            } else if let Some(left) = state.slice_left(id) {
                state = self.sit_out(state, id, left);
            } else {
                return NextStep::Enter;
            }
        }
    }

    /// Parks while the gate is held, and does what tasks there are meanwhile.
    fn wait_held<'a>(&'a self, mut state: MutexGuard<'a, GateState>, id: usize) -> MutexGuard<'a, GateState> {
        state.held += 1;
        self.notify_if_parked(&state);
        let mut done = state.tasks;
        while state.holders != 0 && !state.ending {
            if state.tasks == done || state.wanted == 0 {
                state = self
                    .held_threads
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            done = state.tasks;
            state.wanted -= 1;
            let task = state.task.clone();
            drop(state);
            let ran = catch_unwind(AssertUnwindSafe(|| task.into_iter().for_each(|task| task(id))));
            state = self.lock();
            // There may be a later task, which does not wait for this thread.
            if state.tasks == done {
                state.pending -= 1;
                self.waiters.notify_all();
            }
            if let Err(panic) = ran {
                state.held -= 1;
                drop(state);
                resume_unwind(panic);
            }
        }
        state.held -= 1;
        // The others leave as well: who has not begun with the task will not.
        state.pending -= std::mem::take(&mut state.wanted);
        if state.held == 0 || state.pending == 0 {
            self.waiters.notify_all();
        }
        state
    }

    fn notify_if_parked(&self, state: &GateState) {
        if state.all_parked() {
            self.waiters.notify_all();
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
        self.notify_if_parked(&state);
        let (mut state, _) = self
            .sliced_threads
            .wait_timeout(state, left)
            .unwrap_or_else(PoisonError::into_inner);
        let vcpu = &mut state.vcpus[id];
        vcpu.since = None;
        vcpu.parked += began.elapsed();
        state
    }

    /// Waits until every thread is parked; false after `timeout`.
    pub fn wait_parked(&self, timeout: Duration) -> bool {
        self.wait(timeout, GateState::all_parked)
    }

    /// Waits until nothing but its slices keeps any thread from the guest, or the gate is closed again; false after
    /// `timeout`.
    pub fn wait_entered(&self, timeout: Duration) -> bool {
        self.wait(timeout, |state| state.held == 0 || state.holders != 0)
    }

    /// Wakes at most `helpers` of the threads that are parked because of a holder to do `task` once each, does this
    /// thread's `share`, and waits until `is_done`, which gets the number of woken threads that are not through yet; they
    /// stay parked. False after `timeout`. A thread that wakes up later finds nothing to do.
    pub(super) fn do_parked(
        &self,
        task: ParkedTask,
        helpers: usize,
        share: impl FnOnce(),
        is_done: impl Fn(usize) -> bool,
        timeout: Duration,
    ) -> bool {
        let mut state = self.lock();
        let all = helpers >= state.held;
        state.tasks += 1;
        state.wanted = helpers.min(state.held);
        state.pending = state.wanted;
        state.task = Some(task);
        drop(state);
        if all {
            self.held_threads.notify_all();
        } else {
            (0..helpers).for_each(|_| self.held_threads.notify_one());
        }
        share();
        let done = self.wait(timeout, |state| is_done(state.pending));
        let mut state = self.lock();
        state.task = None;
        state.wanted = 0;
        done
    }

    fn wait(&self, timeout: Duration, done: impl Fn(&GateState) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let left = deadline.saturating_duration_since(Instant::now());
        let (state, _) = self
            .waiters
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
    /// Whether no thread is in the guest, or on its way there.
    fn all_parked(&self) -> bool {
        let in_slices = self.vcpus.iter().filter(|vcpu| vcpu.since.is_some()).count();
        self.held + self.retired + in_slices == self.vcpus.len()
    }

    /// What is left of a vCPU's slice, if it has one.
    fn slice_left(&self, id: usize) -> Option<Duration> {
        let until = self.vcpus.get(id)?.until?;
        let left = until.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
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
    fn opens_only_when_the_last_hold_is_taken_off() {
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
    fn a_pause_that_fails_leaves_no_hold() {
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
    fn parked_threads_do_a_task_each_and_stay_parked() {
        let (gate, threads) = two_parked();
        let patience = Duration::from_secs(5);
        for _ in 0..100 {
            let done: Arc<[AtomicUsize; 2]> = Arc::default();
            let theirs = done.clone();
            let task = Arc::new(move |id: usize| _ = theirs[id].fetch_add(1, Ordering::SeqCst));
            assert!(gate.do_parked(task, 2, || {}, |pending| pending == 0, patience));
            assert!(done.iter().all(|count| count.load(Ordering::SeqCst) == 1));
            assert!(gate.wait_parked(patience));
        }
        assert!(threads.iter().all(|thread| !thread.is_finished()));
        gate.open(Holder::Startup);
        for thread in threads {
            assert_eq!(thread.join().unwrap(), NextStep::Enter);
        }
        let task = Arc::new(|_| unreachable!("no thread is parked"));
        assert!(gate.do_parked(task, 2, || {}, |pending| pending == 0, Duration::ZERO));
    }

    #[test]
    fn no_more_threads_do_a_task_than_are_wanted() {
        let (gate, threads) = two_parked();
        let patience = Duration::from_secs(5);
        for helpers in [0, 1, 2, 3] {
            let began: Arc<AtomicUsize> = Arc::default();
            let theirs = began.clone();
            let task = Arc::new(move |_| _ = theirs.fetch_add(1, Ordering::SeqCst));
            assert!(gate.do_parked(task, helpers, || {}, |pending| pending == 0, patience));
            assert_eq!(began.load(Ordering::SeqCst), helpers.min(2));
        }
        gate.end();
        threads.into_iter().for_each(|thread| _ = thread.join().unwrap());
    }

    #[test]
    fn a_thread_in_a_slice_is_not_woken_for_a_task() {
        let gate = Arc::new(Gate::new(2));
        let patience = Duration::from_secs(5);
        gate.open(Holder::Startup);
        gate.begin_slice(0, Instant::now() + Duration::from_secs(3600));
        let wait_at_gate = |id| {
            let gate = gate.clone();
            thread::spawn(move || gate.pass(id))
        };
        let in_slice = wait_at_gate(0);
        while gate.sliced(Instant::now())[0].is_zero() {
            thread::yield_now();
        }
        gate.close(Holder::Migration);
        let held = wait_at_gate(1);
        assert!(gate.wait_parked(patience));
        let task = Arc::new(|id| assert_eq!(id, 1));
        assert!(gate.do_parked(task, 1, || {}, |pending| pending == 0, patience));
        gate.end();
        for thread in [in_slice, held] {
            assert_eq!(thread.join().unwrap(), NextStep::End);
        }
    }

    #[test]
    fn a_task_that_panics_is_not_waited_for() {
        let (gate, threads) = two_parked();
        let task = Arc::new(|id| assert_ne!(id, 1, "planted"));
        assert!(gate.do_parked(task, 2, || {}, |pending| pending == 0, Duration::from_secs(5)));
        gate.end();
        let ended: Vec<bool> = threads.into_iter().map(|thread| thread.join().is_ok()).collect();
        assert_eq!(ended, [true, false]);
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
