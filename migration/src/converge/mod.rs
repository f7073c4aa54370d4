//! When to go on copying, when to slow the guest down, when to switch, when to say that it cannot be done.
//!
//! A pure policy: it has no clock, does no I/O and starts no thread. The engine tells it what it sees
//! ([`Observation`]), about every 10 ms inside a round and at the end of each, and follows the [`Advice`].
//! So a trace, recorded or made up, replays in microseconds.
//!
//! ```text
//!               ┌─ estimate ───────────────┐   ┌─ predict ──────────────┐
//! Observation ─▶│ bandwidth   dirty rate   │──▶│ downtime  total  room  │──▶ policy ──▶ Advice
//!               │ working set (round 1)    │   └────────────────────────┘     │ ▲
//!               └──────────────────────────┘       throttle: on-share per vCPU┘ │
//!               Costs, bursts ──────────────────────────────────────────────────┘
//! ```
//!
//! What the engine does to be predicted well:
//!
//! - It tells the costs ([`Policy::set_costs`]) as soon as they were rehearsed, and again when they were measured
//!   anew. Until then they are a guess, on which no promise is given up.
//! - With a cap on pre-copy it sends a few MiB without it at the start of each round
//!   ([`Policy::burst`]); otherwise the final copy is taken to be no faster than the cap.
//! - It sends round 1 in a scattered order of pieces of some MiB, so that what is dirtied again early on is
//!   typical of all memory. What it knows to be written all the time comes last, and is not typical
//!   ([`Observation::hot`]).
//! - The prediction of the total time that counts is the first one that is made after a fifth of itself.

mod estimate;
mod interval;
mod miss;
mod noise;
mod policy;
mod predict;
#[cfg(test)]
mod tests;
mod throttle;
mod working_set;

use std::time::Duration;

pub(crate) use interval::Interval;
pub(crate) use miss::{Miss, Reason};
pub(crate) use policy::Policy;
#[cfg(test)]
pub(crate) use throttle::FLOOR;
pub(crate) use throttle::ThrottleShares;

use crate::options::OnMiss;

/// What the caller was promised.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Goal {
    /// Longest downtime.
    pub max_downtime: Duration,
    /// Longest total time, counted from the start of the migration.
    pub deadline: Option<Duration>,
    /// What follows when either cannot be kept.
    pub on_miss: OnMiss,
    /// Cap of the final copy, bytes on the wire per second.
    pub final_bandwidth: Option<f64>,
    /// Cap of pre-copy, bytes on the wire per second.
    pub bandwidth: Option<f64>,
    /// Whether vCPUs may be slowed down.
    pub throttle: bool,
    /// Number of vCPUs.
    pub cpus: usize,
    /// Most pre-copy rounds.
    pub max_rounds: u32,
}

/// What the downtime costs besides the copy, as far as it was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Costs {
    /// Taking the vCPUs out.
    pub pause: Duration,
    /// Finishing device work and flushing disks.
    pub drain: Duration,
    /// The last harvest of dirty pages.
    pub final_log: Duration,
    /// Saving and sending the state.
    pub state: Duration,
    /// Restoring it.
    pub restore: Duration,
    /// Taking the locks and letting the vCPUs in.
    pub resume: Duration,
    /// All the round trips of the switch together.
    pub round_trip: Duration,
}

/// Where the log has what policies are told, with `GODWIT_LOG=recorded=trace`: such lines, and the report, are what the
/// moves in `tests/moves.txt` were made of.
pub(crate) const RECORDED: &str = "recorded";

impl Observation<'_> {
    /// Puts it in the log: `o`, then its fields in microseconds and pages, and what the look at the log took.
    pub(crate) fn trace(&self, final_log: Duration) {
        let us = |time: Duration| time.as_micros();
        let pages = |bytes: u64| bytes / migration_io::PAGE_SIZE;
        tracing::trace!(
            target: RECORDED,
            "o {} {} {} {} {} {} {} {} {} {} {} {} {}",
            us(self.at),
            self.round,
            u8::from(self.end_of_round),
            pages(self.unsent),
            pages(self.dirty),
            pages(self.copied),
            pages(self.copied_data),
            self.wire,
            us(self.late),
            us(final_log),
            pages(self.hot),
            pages(self.put_off),
            u8::from(self.all_streams),
        );
    }
}

impl Costs {
    /// Puts them in the log as rehearsed: `c`, then all in nanoseconds.
    pub(crate) fn trace(&self) {
        let ns = self.all().map(|cost| cost.as_nanos());
        tracing::trace!(target: RECORDED, "c {ns:?}");
    }

    /// The downtime of a guest without a dirty page.
    pub(crate) fn total(&self) -> Duration {
        // The log is looked at a second time while the destination restores.
        let costs = Self {
            restore: self.restore.max(self.final_log),
            ..*self
        };
        costs
            .all()
            .into_iter()
            .fold(Duration::ZERO, Duration::saturating_add)
    }

    /// Each of them, in the order in which they come.
    fn all(&self) -> [Duration; 7] {
        let Self {
            pause,
            drain,
            final_log,
            state,
            restore,
            resume,
            round_trip,
        } = *self;
        [pause, drain, final_log, state, restore, resume, round_trip]
    }
}

impl Default for Costs {
    /// A guess that holds for small machines, until something was measured.
    fn default() -> Self {
        Self {
            pause: Duration::from_micros(500),
            drain: Duration::from_micros(500),
            final_log: Duration::from_micros(500),
            state: Duration::from_millis(1),
            restore: Duration::from_millis(1),
            resume: Duration::from_micros(500),
            round_trip: Duration::from_micros(500),
        }
    }
}

/// What the engine sees at one moment. Counters only grow; sizes in bytes of guest memory unless said otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Observation<'a> {
    /// Since the start of the migration.
    pub at: Duration,
    /// Counted from 1.
    pub round: u32,
    /// Whether all of this round was sent, and received if the round ends with a barrier.
    pub end_of_round: bool,
    /// Pages of this round that are not sent yet; 0 at its end.
    pub unsent: u64,
    /// Pages that were found to be written all the time before round 1, an estimate; 0 where none were, or hardly any
    /// others.
    pub hot: u64,
    /// Those of `unsent` that round 1 puts off to its end: hot pages, and what lies next to them.
    pub put_off: u64,
    /// Whether all streams have sent since the observation before; the final copy is sent by all.
    pub all_streams: bool,
    /// All pages that the destination does not have as they are now, `unsent` included.
    pub dirty: u64,
    /// Guest pages sent (cleared from the log) so far, zero pages included.
    pub copied: u64,
    /// The same without zero pages.
    pub copied_data: u64,
    /// Bytes put on the wire so far.
    pub wire: u64,
    /// How much later than it had asked for the engine was woken for this look.
    pub late: Duration,
    /// Pages dirtied per vCPU so far; empty where not known.
    pub by_vcpu: &'a [u64],
}

/// What a switch, and the migration, would take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Prediction {
    /// The downtime, all terms, if the switch came now.
    pub downtime: Duration,
    /// What holds that downtime nine times in ten. The policy decides by its upper end.
    pub downtime_interval: Interval,
    /// The total time, counted from the start; `None` where the rounds do not shrink.
    pub total: Option<Duration>,
    /// What holds it nine times in ten.
    pub total_interval: Option<Interval>,
    /// Bytes of pages that the guest newly dirties per second, as it runs now.
    pub dirty_rate: f64,
    /// Bytes of pages per second that the link carries, a cautious estimate.
    pub bandwidth: f64,
}

/// What to do now.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Course {
    /// Go on copying; after the end of a round, begin another.
    Continue,
    /// Pause the guest and send what is left.
    Switch,
    /// The promise cannot be kept and the caller does not want less: give up.
    Miss(Miss),
}

/// The answer to an observation.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Advice {
    /// What to do.
    pub course: Course,
    /// How far to slow the vCPUs down until the next advice.
    pub throttle: ThrottleShares,
    /// On what this rests.
    pub prediction: Prediction,
}

/// A duration from seconds of any value.
fn duration(seconds: f64) -> Duration {
    if seconds.is_nan() || seconds <= 0.0 {
        return Duration::ZERO;
    }
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}
