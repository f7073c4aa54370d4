//! Measures what the convergence policy needs, asks it, and applies the throttle that it advises.
//!
//! Whether to pause is only returned, to `precopy`: nothing here pauses the guest or sends anything.

use std::time::{Duration, Instant};

use migration_io::PAGE_SIZE;

use super::crew::Crew;
use super::spare::SpareStreams;
use super::{MigrateError, SourceJob};
use crate::OnMiss;
use crate::converge::{Advice, Costs, Course, Goal, Observation, Policy, Prediction, RECORDED};
use crate::page_set::PageSet;
use crate::report::{Round, ms};

/// The policy and what was measured for it.
pub(super) struct Observer {
    policy: Policy,
    pub(super) costs: Costs,
    /// Bytes of the pages that the guest writes all the time.
    pub(super) hot: u64,
    /// Says how many streams send the round that is under way, where that may be fewer than all.
    pub(super) spare: Option<SpareStreams>,
    /// Scratch space for the log.
    dirty: Option<PageSet>,
    /// The throttle that was last applied, a share for each vCPU.
    shares: Vec<f64>,
    began: RoundBegin,
    /// Throttled time of the round so far: seconds times share.
    throttled: f64,
    last: Duration,
    /// The shorter of the times that the last two counts of the log took: a single slow one may be the host's fault.
    peek_time: Duration,
    /// How much later than planned this thread was woken for the next observation.
    late: Duration,
    /// Whether the log already says that the promise cannot be kept.
    warned: bool,
}

/// Where a round began.
#[derive(Clone, Copy, Debug, Default)]
struct RoundBegin {
    at: Duration,
    wire: u64,
    pages: u64,
}

/// Round trips of the switch: the last pages and the state to "ready", half of "go", half of "resumed".
pub(super) const SWITCH_ROUND_TRIPS: f64 = 2.0;

/// How often the log is counted and the policy asked while the streams are at work.
const TICK: Duration = Duration::from_millis(10);

/// The longest time between two counts, however long it takes to count the log of a large guest.
const MAX_TICK: Duration = Duration::from_millis(250);

/// A smaller change of the throttle is not applied.
const SHARE_STEP: f64 = 0.005;

impl Observer {
    pub(super) fn new(job: &SourceJob<'_>, round_trip: Duration) -> Self {
        let options = job.options;
        let cpus = usize::from(job.source.describe().cpus);
        let costs = Costs {
            round_trip: round_trip.mul_f64(SWITCH_ROUND_TRIPS),
            ..Costs::default()
        };
        let mut policy = Policy::new(Goal {
            max_downtime: options.max_downtime,
            deadline: options.deadline,
            on_miss: options.on_miss,
            final_bandwidth: options.final_bandwidth.map(|rate| rate as f64),
            bandwidth: options.bandwidth.map(|rate| rate as f64),
            throttle: options.throttle,
            cpus,
            max_rounds: options.max_rounds,
        });
        policy.assume(costs);
        Self {
            policy,
            costs,
            hot: 0,
            spare: None,
            dirty: None,
            shares: vec![0.0; cpus],
            began: RoundBegin::default(),
            throttled: 0.0,
            last: Duration::ZERO,
            peek_time: Duration::ZERO,
            late: Duration::ZERO,
            warned: false,
        }
    }

    /// Stores what rehearsals in a row measured of the downtime's costs besides the copy.
    pub(super) fn set_costs(&mut self, rehearsed: &[Costs]) {
        rehearsed.iter().for_each(Costs::trace);
        if let Some(least) = self.policy.set_costs(rehearsed) {
            self.costs = least;
        }
    }

    /// See [`Policy::doubts_costs`].
    pub(super) fn doubts_costs(&self, advice: &Advice) -> bool {
        self.policy.doubts_costs(advice)
    }

    /// How long to wait until the next observation: counting the log takes a tenth of the time at most.
    pub(super) fn tick(&self) -> Duration {
        (self.peek_time * 10).clamp(TICK, MAX_TICK)
    }

    /// Stores how much later than planned this thread was woken.
    pub(super) fn set_wake_delay(&mut self, late: Duration) {
        self.late = late;
    }

    /// Passes a measurement to the policy: pages that were sent without the cap of pre-copy.
    pub(super) fn burst(&mut self, bytes: u64, elapsed: Duration) {
        tracing::trace!(target: RECORDED, "b {bytes} {}", elapsed.as_micros());
        self.policy.burst(bytes, elapsed);
    }

    /// The largest share of any vCPU now.
    fn share(&self) -> f64 {
        self.shares.iter().copied().fold(0.0, f64::max)
    }
}

impl SourceJob<'_> {
    /// Counts the log and asks the policy.
    pub(super) fn observe(
        &mut self,
        crew: &Crew<'_>,
        watch: &mut Observer,
        round: u32,
        end_of_round: bool,
    ) -> Result<Advice, MigrateError> {
        let mut dirty = match watch.dirty.take() {
            Some(set) => set,
            None => crew.space.none()?,
        };
        dirty.clear();
        let began = Instant::now();
        let ((unsent, put_off), (data, zero)) = (crew.unsent_bytes(), crew.counts.pages());
        crew.space.peek(&mut dirty)?;
        let took = began.elapsed();
        watch.peek_time = took.min(watch.costs.final_log);
        watch.costs.final_log = took;
        crew.add_unsent(&mut dirty);
        let at = self.started.elapsed();
        let by_vcpu = crew.space.by_vcpu();
        let observation = Observation {
            at,
            round,
            end_of_round,
            unsent,
            hot: watch.hot,
            put_off,
            all_streams: crew.all_streams_send(),
            dirty: dirty.len() * PAGE_SIZE,
            copied: (data + zero) * PAGE_SIZE,
            copied_data: data * PAGE_SIZE,
            wire: crew.counts.wire(),
            late: std::mem::take(&mut watch.late),
            by_vcpu: &by_vcpu,
        };
        observation.trace(watch.costs.final_log);
        watch.policy.assume(watch.costs);
        let advice = watch.policy.observe(&observation);
        let prediction = &advice.prediction;
        watch.throttled += at.saturating_sub(watch.last).as_secs_f64() * watch.share();
        watch.last = at;
        self.report.predicted_downtime_ms = Some(ms(prediction.downtime));
        self.report.predicted_downtime_interval_ms = Some(prediction.downtime_interval.into());
        if self.report.predicted_total_ms.is_none()
            && let Some(total) = prediction.total.filter(|total| at * 5 >= *total)
        {
            self.report.predicted_total_ms = Some(ms(total));
            self.report.predicted_total_interval_ms = prediction.total_interval.map(Into::into);
        }
        let shares: Vec<f64> = (0..watch.shares.len())
            .map(|cpu| advice.throttle.of(cpu))
            .collect();
        // The throttle is not lifted just before the pause: no prediction has what the guest would write meanwhile.
        if advice.course != Course::Switch {
            self.apply_throttle(watch, &shares)?;
        }
        let continues = self.options.on_miss == OnMiss::Switch && !watch.warned;
        if let Some(miss) = watch.policy.missed().filter(|_| continues) {
            tracing::warn!("going on as was asked, although {miss}");
            watch.warned = true;
        }
        self.publish_progress(&observation, &advice.prediction, watch.share());
        watch.dirty = Some(dirty);
        Ok(advice)
    }

    /// Publishes how far the migration is, as a sample of the trace.
    fn publish_progress(&self, seen: &Observation<'_>, prediction: &Prediction, share: f64) {
        self.control.sample(|progress| {
            progress.round = seen.round;
            progress.remaining_bytes = seen.dirty;
            progress.bytes_sent = seen.wire;
            progress.dirty_bytes_per_s = prediction.dirty_rate;
            progress.bandwidth_bytes_per_s = prediction.bandwidth;
            progress.throttle_percent = share * 100.0;
            progress.predicted_downtime_ms = Some(ms(prediction.downtime));
            progress.predicted_downtime_interval_ms = Some(prediction.downtime_interval.into());
            progress.predicted_total_ms = prediction.total.map(ms);
            progress.predicted_total_interval_ms = prediction.total_interval.map(Into::into);
        });
    }

    /// Slows the vCPUs down by these shares, if they have changed.
    fn apply_throttle(&mut self, watch: &mut Observer, shares: &[f64]) -> Result<(), MigrateError> {
        let same = |(a, b): (&f64, &f64)| (a - b).abs() < SHARE_STEP && (*a == 0.0) == (*b == 0.0);
        if watch.shares.iter().zip(shares).all(same) {
            return Ok(());
        }
        self.standing.remains.throttled = true;
        self.call("throttle", |source| source.throttle(shares))?;
        watch.shares = shares.to_vec();
        Ok(())
    }

    /// Stores where a round begins.
    pub(super) fn begin_round(&mut self, crew: &Crew<'_>, watch: &mut Observer, n: u32) {
        let (data, zero) = crew.counts.pages();
        let at = self.started.elapsed();
        watch.began = RoundBegin {
            at,
            wire: crew.counts.wire(),
            pages: data + zero,
        };
        watch.throttled = 0.0;
        watch.last = at;
        self.control.update(|progress| progress.round = n);
    }

    /// Adds a round that has ended to the report.
    pub(super) fn end_round(&mut self, crew: &Crew<'_>, watch: &Observer, n: u32, advice: &Advice) {
        let began = watch.began;
        let (data, zero) = crew.counts.pages();
        let took = self.started.elapsed().saturating_sub(began.at);
        let seconds = took.as_secs_f64().max(1e-9);
        let bytes = crew.counts.wire() - began.wire;
        let round = Round {
            n,
            pages: data + zero - began.pages,
            bytes,
            ms: ms(took),
            dirty_bytes_per_s: advice.prediction.dirty_rate,
            bandwidth_bytes_per_s: bytes as f64 / seconds,
            throttle_percent: 100.0 * watch.throttled / seconds,
        };
        tracing::debug!(?round, "round");
        self.report.rounds.push(round);
    }
}
