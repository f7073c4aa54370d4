//! Slowing vCPUs down: each is kept out of the guest for a share of the time, in short slices.
//!
//! A thread, there only while a vCPU is slowed down, begins each slice and kicks the vCPU; the vCPU's own
//! thread sits the slice out at the gate and goes on by itself. How long it really sat there is measured, and
//! the next slice makes up for the difference, so that late timers do not change the share.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migration::MAX_THROTTLE;
use threads::{Role, Thread};

use super::VcpuError;
use super::gate::Gate;

/// The longest slice.
const MAX_OFF: Duration = Duration::from_millis(10);
/// The shortest slice: below it, kicks would cost more than they hold back.
const MIN_OFF: Duration = Duration::from_millis(1);
/// A vCPU runs that long between two slices as long as slices can be made longer instead: to leave the guest
/// and to come back, with cold caches, costs it some 100 µs.
const GOOD_ON: Duration = Duration::from_millis(2);
/// A vCPU runs at least that long between two slices, so that it gets something done.
const MIN_ON: Duration = Duration::from_micros(200);
/// What differences between what was asked and what was reached add up to before older ones are forgotten.
const MAX_DEBT: f64 = 20e-3;

/// Gets a vCPU thread out of the guest, by its number.
pub(super) type Kick = Arc<dyn Fn(usize) + Send + Sync>;

/// The throttle of all vCPUs of a machine.
pub(super) struct Throttle {
    gate: Arc<Gate>,
    kick: Kick,
    shared: Arc<ThrottleShared>,
    thread: Mutex<Option<Thread>>,
}

#[derive(Default)]
struct ThrottleShared {
    /// A share for each vCPU; none at all means that the thread shall end.
    shares: Mutex<Vec<f64>>,
    changed: Condvar,
}

impl Throttle {
    pub(super) fn new(gate: Arc<Gate>, kick: Kick) -> Self {
        Self {
            gate,
            kick,
            shared: Arc::default(),
            thread: Mutex::default(),
        }
    }

    /// From now on keeps each vCPU out for a share of the time, 0 to 1, in slices of at most 10 ms; at a
    /// share of 0 it is in at once. The shares that can be reached end at [`MAX_THROTTLE`]: a vCPU must get something
    /// done.
    pub(super) fn set(&self, shares: &[f64]) -> Result<(), VcpuError> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if !shares.iter().any(|share| *share > 0.0) {
            self.end(&mut thread);
            return Ok(());
        }
        let usable = |share: &f64| {
            if share.is_nan() {
                0.0
            } else {
                share.clamp(0.0, MAX_THROTTLE)
            }
        };
        *self.shared.lock() = shares.iter().map(usable).collect();
        self.shared.changed.notify_all();
        // A vCPU in a slice of its old share is let in, and gets a slice of the new one in its turn.
        self.gate.end_slices();
        if thread.is_none() {
            let (gate, kick, shared) = (self.gate.clone(), self.kick.clone(), self.shared.clone());
            let run = move || run(&gate, &kick, &shared);
            let spawned = threads::spawn(Role::Throttle, "throttle", run);
            *thread = Some(spawned.map_err(VcpuError::Throttle)?);
        }
        Ok(())
    }

    fn end(&self, thread: &mut Option<Thread>) {
        self.shared.lock().clear();
        self.shared.changed.notify_all();
        if let Some(thread) = thread.take() {
            // A panic in it has been reported by the panic hook.
            let _ = thread.join();
        }
        self.gate.end_slices();
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.end(&mut thread);
    }
}

impl ThrottleShared {
    fn lock(&self) -> MutexGuard<'_, Vec<f64>> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn run(gate: &Gate, kick: &Kick, shared: &ThrottleShared) {
    let mut plans: Vec<SlicePlan> = Vec::new();
    let mut shares = shared.lock();
    while !shares.is_empty() {
        let now = Instant::now();
        let sliced = gate.sliced(now);
        plans.resize(shares.len().min(sliced.len()), SlicePlan::new(now));
        for (id, (plan, (share, sliced))) in plans.iter_mut().zip(shares.iter().zip(sliced)).enumerate() {
            let Some(off) = plan.due(now, *share, sliced) else {
                continue;
            };
            if gate.begin_slice(id, now + off) {
                kick(id);
            } else {
                plan.forget(now);
            }
        }
        let next = plans.iter().filter_map(|plan| plan.next).min();
        let wait = next.map_or(MAX_OFF, |next| next.saturating_duration_since(Instant::now()));
        (shares, _) = shared
            .changed
            .wait_timeout(shares, wait)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

/// When one vCPU's next slice begins, and how long it is.
#[derive(Clone, Copy, Debug)]
struct SlicePlan {
    share: f64,
    /// When the next slice begins; never where the share is 0.
    next: Option<Instant>,
    /// At the begin of the last slice: the time, and how long the vCPU had sat out until then.
    last: Instant,
    sliced: Duration,
    /// Seconds that the vCPU should have sat out and has not.
    debt: f64,
}

impl SlicePlan {
    fn new(now: Instant) -> Self {
        Self {
            share: 0.0,
            next: None,
            last: now,
            sliced: Duration::ZERO,
            debt: 0.0,
        }
    }

    /// The length of the slice that begins now, if one does. `sliced` is how long the vCPU has sat out so far.
    fn due(&mut self, now: Instant, share: f64, sliced: Duration) -> Option<Duration> {
        let wanted = self.share * (now - self.last).as_secs_f64();
        let got = sliced.saturating_sub(self.sliced).as_secs_f64();
        self.debt = (self.debt + wanted - got).clamp(-MAX_DEBT, MAX_DEBT);
        (self.last, self.sliced) = (now, sliced);
        let (on, off) = slices(share);
        if share != self.share {
            self.share = share;
            self.debt = if share > 0.0 { self.debt } else { 0.0 };
            // Shares that change often must not put the slice off for ever.
            let next = self.next.map_or(now + on, |next| next.min(now + on));
            self.next = (share > 0.0).then_some(next);
        }
        if self.next.is_none_or(|next| next > now) {
            return None;
        }
        // The slice pays for itself and the run after it, and for what is still owed.
        let owed = self.debt + share * (on + off).as_secs_f64();
        let off = Duration::from_secs_f64(owed.max(0.0)).min(MAX_OFF);
        self.next = Some(now + off + on);
        Some(off)
    }

    /// The slice that was due is not one: the vCPU is held anyway.
    fn forget(&mut self, now: Instant) {
        self.next = Some(now + MIN_OFF);
        self.debt = 0.0;
    }
}

/// How long a vCPU is let in and kept out in turn.
fn slices(share: f64) -> (Duration, Duration) {
    // As short as allowed, which is the smoothest; long enough that the vCPU runs a while as well.
    let off =
        (GOOD_ON.as_secs_f64() * share / (1.0 - share)).clamp(MIN_OFF.as_secs_f64(), MAX_OFF.as_secs_f64());
    let on = (off * (1.0 - share) / share).clamp(MIN_ON.as_secs_f64(), 1.0);
    (Duration::from_secs_f64(on), Duration::from_secs_f64(off))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets a plan run for a while against a vCPU that sits out what it is told to and `late` more.
    fn reached(shares: &[f64], late: Duration) -> f64 {
        let began = Instant::now();
        let (mut now, mut sliced) = (began, Duration::ZERO);
        let mut plan = SlicePlan::new(began);
        let mut longest = Duration::ZERO;
        for turn in 0.. {
            if now - began > Duration::from_secs(20) {
                break;
            }
            if let Some(off) = plan.due(now, shares[turn % shares.len()], sliced) {
                longest = longest.max(off);
                sliced += off + late;
            }
            now = plan.next.unwrap() + Duration::from_micros(60);
        }
        assert!(longest <= MAX_OFF);
        sliced.as_secs_f64() / (now - began).as_secs_f64()
    }

    #[test]
    fn the_share_is_reached_however_late_timers_are() {
        for share in [0.05, 0.2, 0.5, 0.8, 0.95] {
            for late in [0, 80, 200].map(Duration::from_micros) {
                let reached = reached(&[share], late);
                assert!(
                    (reached - share).abs() < 0.01,
                    "{share}, {late:?} late: {reached}"
                );
            }
        }
    }

    #[test]
    fn shares_that_change_all_the_time_are_reached_on_average() {
        let reached = reached(&[0.3, 0.5], Duration::ZERO);
        assert!((reached - 0.4).abs() < 0.1, "{reached}");
    }

    #[test]
    fn slices_are_short_and_leave_time_to_run() {
        for share in [1e-9, 0.01, 0.2, 0.5, 0.95, 0.98, 1.0] {
            let (on, off) = slices(share);
            assert!(
                (MIN_OFF..=MAX_OFF).contains(&off) && on >= MIN_ON,
                "{share}: {on:?}, {off:?}"
            );
        }
    }

    #[test]
    fn the_thread_is_there_only_while_a_vcpu_is_slowed_down() {
        let gate = Arc::new(Gate::new(2));
        gate.open(crate::vcpu::Holder::Startup);
        let (kicked, kicks) = std::sync::mpsc::channel();
        let kick = Arc::new(move |id| kicked.send(id).unwrap());
        let throttle = Throttle::new(gate.clone(), kick);
        throttle.set(&[0.0, 0.5]).unwrap();
        assert_eq!(kicks.recv_timeout(Duration::from_secs(5)), Ok(1));
        throttle.set(&[0.0, f64::NAN]).unwrap();
        assert!(throttle.thread.lock().unwrap().is_none());
        // No vCPU is kept out any more.
        assert_eq!(gate.pass(1), super::super::gate::NextStep::Enter);
    }
}
