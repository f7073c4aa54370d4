//! How other threads cancel and watch a migration, and decide about a machine in doubt.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use serde::{Deserialize, Serialize};

use crate::report::{IntervalMs, ms};

/// Where a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Not started, or waiting for a connection.
    #[default]
    Waiting,
    /// The two sides find out whether the move can be made.
    Handshake,
    /// Disks that come along are copied while the guest runs.
    Mirror,
    /// Memory is copied while the guest runs.
    Precopy,
    /// The guest is paused; the last pages and the state are copied.
    StopAndCopy,
    /// "go" was sent or received.
    Commit,
    /// It ended, one way or another.
    Done,
}

/// A live picture of a migration, and one sample of its trace. Times in milliseconds, rates in bytes per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Where it is.
    pub phase: Phase,
    /// The round under way, counted from 1.
    pub round: u32,
    /// Bytes of guest memory, and of disks that come along, that the destination does not have as they are now.
    pub remaining_bytes: u64,
    /// Bytes of guest RAM and of disks that come along.
    pub total_bytes: u64,
    /// Bytes put on the wire so far.
    pub bytes_sent: u64,
    /// What the guest dirties per second.
    pub dirty_bytes_per_s: f64,
    /// What is sent per second.
    pub bandwidth_bytes_per_s: f64,
    /// Share of time that the vCPUs are held out of the guest, in percent; that of the slowest.
    pub throttle_percent: f64,
    /// The downtime if the guest were paused now.
    pub predicted_downtime_ms: Option<f64>,
    /// What holds that downtime nine times in ten; none in the traces of older versions.
    #[serde(default)]
    pub predicted_downtime_interval_ms: Option<IntervalMs>,
    /// When it will have ended, counted from its start.
    pub predicted_total_ms: Option<f64>,
    /// What holds that time nine times in ten; none in the traces of older versions.
    #[serde(default)]
    pub predicted_total_interval_ms: Option<IntervalMs>,
    /// Since the start of the migration.
    pub elapsed_ms: f64,
}

/// What an operator decides about a machine that is ready at the destination while the source is silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// It runs here. Only right if it will never run at the source again.
    Run,
    /// It is thrown away here.
    Discard,
}

/// Cancels a migration from any thread, and shows how far it is. Once cancelled it stays so; a destination that
/// was not cancelled may use one value for all of its attempts.
#[derive(Debug)]
pub struct Control {
    cancelled: AtomicBool,
    /// Readable for ever once cancelled.
    cancel: OwnedFd,
    /// Readable once the guest was paused for as long as it may be, until the limit is lifted.
    timer: OwnedFd,
    /// Readable when `cancel` or `timer` is: every wait for a socket waits for it as well.
    wake: OwnedFd,
    /// Whether the guest is paused for a limited time: saves the lock while it is not.
    limited: AtomicBool,
    /// Readable while there is a decision to take.
    decided: OwnedFd,
    live: Mutex<Live>,
}

/// Samples in the order in which they were taken. The longer the migration lasts, the fewer are kept, so that those of
/// days need some MiB.
#[derive(Debug, Default)]
struct Samples {
    samples: Vec<Progress>,
}

impl Samples {
    /// A sample is kept if the one before is older than this part of the time since the start: all of them for the
    /// first minutes, one every second after hours.
    const FINENESS: f64 = 16384.0;

    fn keep(&mut self, sample: Progress) {
        let fine = sample.elapsed_ms / Self::FINENESS;
        let is_new = self
            .samples
            .last()
            .is_none_or(|last| sample.elapsed_ms - last.elapsed_ms >= fine || sample.phase != last.phase);
        if is_new {
            self.samples.push(sample);
        }
    }
}

#[derive(Debug, Default)]
struct Live {
    progress: Progress,
    trace: Samples,
    /// Whether an operator may decide.
    undecided: bool,
    decision: Option<Decision>,
    /// Set while a migration is under way.
    started: Option<Instant>,
    limit: Option<PauseLimit>,
}

/// How long a pause may last, and so when it has to be over.
#[derive(Clone, Copy, Debug)]
struct PauseLimit {
    at_most: Duration,
    until: Instant,
}

/// Why a migration has to end before "go".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interruption {
    /// The operator or the API's client cancelled it.
    Cancelled,
    /// The guest was paused for this long, which is the limit.
    PausedTooLong(Duration),
}

impl Live {
    fn keep_sample(&mut self) {
        let elapsed_ms = self.started.map_or(0.0, |started| ms(started.elapsed()));
        self.trace.keep(Progress {
            elapsed_ms,
            ..self.progress
        });
    }
}

impl Control {
    /// A control for one migration. Fails when the process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        let new_event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let (cancel, timer) = (new_event()?, timer()?);
        let wake = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for event in [&cancel, &timer] {
            epoll::add(&wake, event, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(Self {
            cancelled: AtomicBool::new(false),
            cancel,
            timer,
            wake,
            limited: AtomicBool::new(false),
            decided: new_event()?,
            live: Mutex::default(),
        })
    }

    /// Cancels the migration. Before the commit it ends at once; after it, a cancel has no effect.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        // Can only fail when the counter is at its limit, and then the descriptor is readable anyway.
        let _ = rustix::io::write(&self.cancel, &1u64.to_ne_bytes());
    }

    /// Decides about a machine that waits for "go" while its source is silent. Returns whether there is one; without
    /// one nothing is decided.
    pub fn decide(&self, decision: Decision) -> bool {
        let mut live = self.lock();
        if !live.undecided {
            return false;
        }
        live.decision = Some(decision);
        // Can only fail when the counter is at its limit, and then the descriptor is readable anyway.
        let _ = rustix::io::write(&self.decided, &1u64.to_ne_bytes());
        true
    }

    /// Sets whether a machine waits while its source is silent, so that an operator may decide.
    pub(crate) fn set_undecided(&self, undecided: bool) {
        let mut live = self.lock();
        live.undecided = undecided;
        live.decision = None;
    }

    /// The source is alive again: from here on the operator may not decide. Returns false if the operator has decided
    /// meanwhile: [`Control::decide`] returned that it counts, so the caller has to carry it out.
    pub(crate) fn end_doubt(&self) -> bool {
        let mut live = self.lock();
        live.undecided = live.decision.is_some();
        !live.undecided
    }

    /// Whether an operator may decide.
    #[cfg(test)]
    pub(crate) fn is_undecided(&self) -> bool {
        self.lock().undecided
    }

    /// The operator's decision; each is returned once.
    pub(crate) fn take_decision(&self) -> Option<Decision> {
        // The event is cleared first: a decision in between is returned now, and the event then wakes once in vain.
        let _ = rustix::io::read(&self.decided, &mut [0; 8]);
        self.lock().decision.take()
    }

    /// What becomes readable when there is a decision to take.
    pub(crate) fn decided(&self) -> BorrowedFd<'_> {
        self.decided.as_fd()
    }

    /// Whether the migration was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// How far the migration is.
    pub fn progress(&self) -> Progress {
        let live = self.lock();
        let elapsed_ms = live
            .started
            .map_or(live.progress.elapsed_ms, |started| ms(started.elapsed()));
        Progress {
            elapsed_ms,
            ..live.progress
        }
    }

    /// The samples of the trace from number `from` on; an empty answer means that there are no newer ones yet.
    pub fn samples(&self, from: usize) -> Vec<Progress> {
        self.lock().trace.samples.get(from..).unwrap_or_default().to_vec()
    }

    /// Why the migration has to end before "go", if it has to.
    pub(crate) fn interruption(&self) -> Option<Interruption> {
        if self.is_cancelled() {
            return Some(Interruption::Cancelled);
        }
        if !self.limited.load(Ordering::SeqCst) {
            return None;
        }
        let limit = self.lock().limit?;
        (Instant::now() >= limit.until).then_some(Interruption::PausedTooLong(limit.at_most))
    }

    /// Limits the pause, which began at `from`. Waiting threads are woken when it is over.
    pub(crate) fn limit_pause(&self, from: Instant, at_most: Duration) {
        // A limit beyond the clock's end is none.
        let until = from.checked_add(at_most);
        self.set_limit(until.map(|until| PauseLimit { at_most, until }));
    }

    /// Lifts the limit: the guest runs again, or "go" was sent and only the peer can end the pause.
    pub(crate) fn lift_pause_limit(&self) {
        self.set_limit(None);
    }

    fn set_limit(&self, limit: Option<PauseLimit>) {
        self.lock().limit = limit;
        self.limited.store(limit.is_some(), Ordering::SeqCst);
        // A time of zero would turn the timer off.
        let left = limit.map_or(Duration::ZERO, |limit| {
            let left = limit.until.saturating_duration_since(Instant::now());
            left.max(Duration::from_nanos(1))
        });
        let time = Itimerspec {
            it_interval: timespec(Duration::ZERO),
            it_value: timespec(left),
        };
        // Fails for no time that `timespec` makes; should it do so all the same, every wait has an end of its own.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time);
    }

    /// What becomes readable when the migration has to end: see [`Control::interruption`].
    pub(crate) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Waits until the migration is cancelled, for at most this long.
    pub(crate) fn wait_for_cancel(&self, at_most: Duration) {
        let mut events = [PollFd::new(&self.cancel, PollFlags::IN)];
        // An interrupted wait is a short one.
        let _ = poll(&mut events, Timespec::try_from(at_most).ok().as_ref());
    }

    /// A migration begins.
    pub(crate) fn begin(&self) {
        let progress = Progress {
            phase: Phase::Handshake,
            ..Progress::default()
        };
        *self.lock() = Live {
            progress,
            trace: Samples::default(),
            undecided: false,
            decision: None,
            started: Some(Instant::now()),
            limit: None,
        };
    }

    /// Changes the picture and keeps it as a sample of the trace.
    pub(crate) fn sample(&self, change: impl FnOnce(&mut Progress)) {
        let mut live = self.lock();
        change(&mut live.progress);
        live.keep_sample();
    }

    /// It ended.
    pub(crate) fn end(&self) {
        let mut live = self.lock();
        live.keep_sample();
        live.progress.phase = Phase::Done;
        if let Some(started) = live.started.take() {
            live.progress.elapsed_ms = ms(started.elapsed());
        }
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.lock().progress);
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn timer() -> io::Result<OwnedFd> {
    Ok(timerfd_create(
        TimerfdClockId::Monotonic,
        TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
    )?)
}

fn timespec(time: Duration) -> Timespec {
    Timespec::try_from(time).unwrap_or(Timespec {
        tv_sec: i64::MAX,
        tv_nsec: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_of_days_stays_small_and_has_every_phase() {
        let mut trace = Samples::default();
        let day_ms = 86_400_000.0;
        let mut at = 0.0;
        while at < 2.0 * day_ms {
            trace.keep(Progress {
                elapsed_ms: at,
                phase: Phase::Precopy,
                ..Progress::default()
            });
            at += 20.0;
        }
        for phase in [Phase::StopAndCopy, Phase::Commit] {
            trace.keep(Progress {
                elapsed_ms: at,
                phase,
                ..Progress::default()
            });
        }
        let bytes = trace.samples.len() * size_of::<Progress>();
        assert!(bytes < 16 << 20, "{bytes} bytes");
        assert!(
            trace.samples[15_000].elapsed_ms <= 300_000.0,
            "all of the first minutes"
        );
        let phases: Vec<_> = trace
            .samples
            .iter()
            .rev()
            .take(3)
            .map(|last| last.phase)
            .collect();
        assert_eq!(phases, [Phase::Commit, Phase::StopAndCopy, Phase::Precopy]);
    }
}
