//! The advice.

mod hopeless;

use std::collections::VecDeque;
use std::time::Duration;

use migration_io::PAGE_SIZE;

use super::estimate::{Bandwidth, DirtyRate, Meter, ObservedStep};
use super::interval::{Interval, least_cost, most_cost};
use super::noise::Lateness;
use super::predict::{Outlook, ThrottlePlan};
use super::throttle::{Demand, Throttler};
use super::working_set::{HOT_FREQUENCY, Model, WorkingSet};
use super::{Advice, Costs, Course, Goal, Miss, Observation, Prediction, duration};
use crate::options::OnMiss;
use hopeless::Shrinkage;

/// Decides, observation by observation, for one migration.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    goal: Goal,
    costs: Costs,
    /// Seconds that the last rehearsals found the costs to be; none before the first.
    rehearsed: VecDeque<f64>,
    lateness: Lateness,
    meter: Meter,
    link: Bandwidth,
    /// The same of all streams together, where some of them have rested.
    all_streams: Bandwidth,
    burst: Bandwidth,
    rate: DirtyRate,
    working_set: WorkingSet,
    /// What round 1 shows of the pages that it puts off.
    hot_set: WorkingSet,
    /// Most bytes that were dirty after round 1.
    most_dirty: f64,
    throttler: Throttler,
    /// Share of the bandwidth that a throttled guest may dirty.
    target: f64,
    /// Whether the guest was found to be too fast once.
    overload: bool,
    /// What a round takes besides its bytes, seconds.
    overhead: Option<f64>,
    /// Whether the observation before ended a round.
    between_rounds: bool,
    progress: Shrinkage,
    /// The least downtime at which the observations since then found that it is time to switch.
    settled: Option<f64>,
    /// Seconds at which the deadline began to look lost.
    late_since: Option<f64>,
    /// Seconds since when nothing but slow rehearsals and stalls puts the switch off.
    put_off_since: Option<f64>,
    missed: Option<Miss>,
}

impl Policy {
    /// Parts of the time left by which the rest of a move may be shorter and longer than predicted where the guest has to be
    /// slowed down: it is slowed down rather too much than too little.
    const UNSEEN_THROTTLED: (f64, f64) = (0.2, 0.08);
    /// How many times as long as the least it may take a guest to write to a hot page for the first time: likely, and at
    /// the most. Its CPU may be wanted by others, and a page of a huge page has to be mapped anew.
    const HOT_FAULT: (f64, f64) = (2.0, 5.0);
    /// Seconds over which the link's variation is measured.
    const VARIES_OVER: f64 = 0.08;
    /// Share of the bandwidth above which a guest is slowed down: rounds that shrink by less than this take long.
    const LIMIT: f64 = 0.85;
    /// Share to which it is slowed down: the dirty set then shrinks by 30 % of the bandwidth, whatever the guest.
    const TARGET: f64 = 0.7;
    /// Part of the time left until the deadline that is planned with.
    const PUNCTUALITY: f64 = 0.85;
    /// A promise looks lost for so many seconds before it is given up.
    const PATIENCE: f64 = 0.2;
    /// Seconds for which a host that is not quiet may put the switch off before the promise is given up.
    const PUT_OFF: f64 = 2.0;
    /// A moment to switch is none any more when the downtime has grown by this factor and this time.
    const STEADY: f64 = 1.25;
    const STEADY_TIME: f64 = 1e-3;
    /// Rehearsals that are remembered.
    const REHEARSALS: usize = 12;
    /// The share of cases that an upper end is to hold.
    const SURE: f64 = 0.9;

    /// Bytes per second that one vCPU can newly dirty: the first write to a page that the log watches is a fault,
    /// and takes 1 to 3 microseconds, most under nested virtualisation.
    const FASTEST: f64 = PAGE_SIZE as f64 / 2e-6;

    /// A policy that has not seen anything yet.
    pub(crate) fn new(goal: Goal) -> Self {
        Self {
            throttler: Throttler::new(goal.cpus),
            goal,
            costs: Costs::default(),
            rehearsed: VecDeque::new(),
            lateness: Lateness::default(),
            meter: Meter::default(),
            link: Bandwidth::default(),
            all_streams: Bandwidth::default(),
            burst: Bandwidth::default(),
            rate: DirtyRate::default(),
            working_set: WorkingSet::new(),
            hot_set: WorkingSet::new(),
            most_dirty: 0.0,
            target: Self::TARGET,
            overload: false,
            overhead: None,
            between_rounds: false,
            progress: Shrinkage::default(),
            settled: None,
            late_since: None,
            put_off_since: None,
            missed: None,
        }
    }

    /// Takes costs of which some are a guess, or change all the time: nothing is learnt from how they do.
    pub(crate) fn assume(&mut self, costs: Costs) {
        self.costs = costs;
    }

    /// Takes what rehearsals have found, one after the other at one time, and returns the least of it: that is what the
    /// pause costs, as what was more is the host's. How much more there was tells how far that can be trusted. `None` if
    /// there was no rehearsal.
    pub(crate) fn set_costs(&mut self, rehearsed: &[Costs]) -> Option<Costs> {
        for costs in rehearsed {
            if self.rehearsed.len() == Self::REHEARSALS {
                self.rehearsed.pop_front();
            }
            self.rehearsed.push_back(without_log(*costs));
        }
        let least = rehearsed.iter().min_by_key(|costs| costs.total()).copied();
        self.costs = least.unwrap_or(self.costs);
        least
    }

    /// Whether more rehearsals may help: the switch is put off by how much the costs have differed, and by nothing else.
    pub(crate) fn doubts_costs(&self, advice: &Advice) -> bool {
        let Prediction {
            downtime,
            downtime_interval,
            ..
        } = advice.prediction;
        let budget = self.goal.max_downtime;
        downtime <= budget
            && downtime_interval.high > budget
            && self.costs_worst() > most_cost(self.costs_now())
    }

    fn costs_now(&self) -> f64 {
        self.costs.total().as_secs_f64()
    }

    /// What the costs may come up to: what is likely on a quiet host, and what four of five rehearsals stayed below.
    fn costs_worst(&self) -> f64 {
        let mut sorted: Vec<f64> = self.rehearsed.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let index = (0.8 * sorted.len() as f64) as usize;
        let seen = sorted.get(index).copied().unwrap_or(0.0);
        // The look at the log is measured all the time, and apart: none of the rehearsals has one of its own.
        let log = self.costs_now() - without_log(self.costs);
        most_cost(self.costs_now()).max(seen + log)
    }

    /// Takes the speed of a piece of at least a few MiB that was sent without the cap of pre-copy, from its
    /// first byte sent to its last byte received: what a final copy without a cap can count on.
    pub(crate) fn burst(&mut self, bytes: u64, elapsed: Duration) {
        self.burst.push(bytes as f64 / elapsed.as_secs_f64());
    }

    /// Why the promise cannot be kept, if that is so. With [`OnMiss::Switch`] the migration goes on.
    pub(crate) fn missed(&self) -> Option<&Miss> {
        self.missed.as_ref()
    }

    /// Takes an observation, says what to do.
    pub(crate) fn observe(&mut self, seen: &Observation<'_>) -> Advice {
        let step = self.meter.step(seen);
        self.learn(seen, &step);
        let before = self.outlook(seen);
        let plan = self.plan(&before);
        let first = seen.round <= 1 && !seen.end_of_round;
        let demand = self.demand(&before, plan, first);
        self.throttler
            .step(step.elapsed, step.dirtied, seen.by_vcpu, demand);
        let outlook = Outlook {
            natural: self.natural(),
            ..before
        };
        self.overload |= self.is_overload(seen, &outlook);
        let course = self.judge(seen, &outlook);
        self.settled = (course == Course::Switch).then(|| {
            let downtime = outlook.downtime(outlook.dirty);
            self.settled.map_or(downtime, |settled| settled.min(downtime))
        });
        // A guest that is about to be paused stays slowed down until then: the engine may look once more, and
        // has to find the guest that this course was about.
        if matches!(course, Course::Miss(_)) {
            self.throttler.release();
        }
        let model = self.model(seen).filter(|_| first);
        // What the guest's first writes to hot pages take shows when those are sent.
        let likely = outlook.with_faults_of(Self::HOT_FAULT.0);
        let total = likely.total(plan, model);
        Advice {
            course,
            throttle: self.throttler.throttle(),
            prediction: Prediction {
                downtime: duration(outlook.downtime(outlook.dirty)),
                downtime_interval: outlook.downtime_interval(),
                total: total.map(duration),
                total_interval: total.map(|total| self.total_interval(&likely, plan, model, total)),
                dirty_rate: outlook.rate,
                bandwidth: outlook.link_usual,
            },
        }
    }

    fn learn(&mut self, seen: &Observation<'_>, step: &ObservedStep) {
        let round_trip = self.costs.round_trip.as_secs_f64();
        self.link.add(step, self.meter.page_ratio(), round_trip);
        if seen.all_streams {
            self.all_streams.add(step, self.meter.page_ratio(), round_trip);
        }
        self.rate.add(step);
        self.lateness.add(step.elapsed, seen.late);
        if seen.round <= 1 {
            let set = if seen.hot == 0 || seen.unsent > seen.put_off {
                &mut self.working_set
            } else {
                &mut self.hot_set
            };
            set.add(step, self.throttler.on());
        } else {
            self.most_dirty = self.most_dirty.max(seen.dirty as f64);
        }
        let sending = step.data / self.link.median();
        if self.between_rounds && step.end_of_round && self.link.is_known() {
            let overhead = (step.elapsed - sending).clamp(0.0, 0.02);
            self.overhead = Some(
                self.overhead
                    .map_or(overhead, |before| f64::midpoint(before, overhead)),
            );
        }
        self.between_rounds = step.end_of_round;
    }

    /// What round 1 has shown so far of the guest, besides the pages that it writes all the time.
    fn model(&self, seen: &Observation<'_>) -> Option<Model> {
        let quiet = (seen.hot > 0).then_some(Model::QUIET);
        self.working_set.model().or(quiet)
    }

    /// How many bytes are written all the time, and how many that dirties per second: as it was found before round 1, until
    /// round 1 has sent them and shows how many of those that it put off are.
    fn hot(&self, seen: &Observation<'_>) -> (f64, f64) {
        let (left, sent) = (seen.put_off as f64, self.hot_set.sent());
        let unseen = if sent > 0.0 { left / (left + sent) } else { 1.0 };
        let assumed = seen.hot as f64 * unseen;
        let model = self.hot_set.model().unwrap_or(Model::QUIET);
        let shown = self.hot_set.size(model, 0.0);
        (assumed + shown, HOT_FREQUENCY * assumed + model.frequency * shown)
    }

    /// What the rest of this round is sent at; after its end what all streams reach.
    fn speed(&self, seen: &Observation<'_>) -> &Bandwidth {
        if seen.all_streams || seen.end_of_round {
            self.full_speed()
        } else {
            &self.link
        }
    }

    /// What all streams reach.
    fn full_speed(&self) -> &Bandwidth {
        if self.all_streams.is_known() {
            &self.all_streams
        } else {
            &self.link
        }
    }

    fn outlook(&self, seen: &Observation<'_>) -> Outlook {
        let unsent = seen.unsent as f64;
        let (hot, hot_rate) = self.hot(seen);
        let unsent_hot = (seen.put_off as f64).min(hot);
        let (rate, first) = (self.rate.rate(), seen.round <= 1);
        let (link, full) = (self.speed(seen), self.full_speed());
        // A burst is a copy like the final one, not a moment of it; but during the final one the guest leaves its
        // CPUs to whoever copies, which not every burst is so lucky as to find.
        let (final_usual, final_worst) = if self.burst.is_known() {
            (self.burst.good(), self.burst.worst())
        } else {
            (full.usual(), full.worst())
        };
        let cap = self
            .goal
            .final_bandwidth
            .map_or(f64::INFINITY, |cap| cap * self.meter.page_ratio())
            .max(1.0);
        let costs = self.costs_now();
        let final_best = if self.burst.is_known() { &self.burst } else { full };
        let final_best = (final_best.best() * 1.15).min(cap);
        let model = self.model(seen);
        let working_set = model.map_or(f64::INFINITY, |model| {
            let others = if first { unsent - unsent_hot } else { 0.0 };
            hot + self.working_set.size(model, others)
        });
        // The length of the downtime decides how likely it is that the host takes the CPUs away meanwhile.
        let about = costs + (seen.dirty as f64 / final_usual).min(self.goal.max_downtime.as_secs_f64());
        let lost = self.lateness.lost_in(about, Self::SURE);
        Outlook {
            at: seen.at.as_secs_f64(),
            unsent,
            hot,
            hot_rate,
            unsent_hot,
            dirty: (seen.dirty as f64).max(unsent),
            rate,
            natural: self.natural(),
            working_set: working_set.max(self.most_dirty),
            fastest: self.goal.cpus as f64 * Self::FASTEST,
            fastest_possible: self.goal.cpus as f64 * Self::FASTEST,
            link: link.recent(),
            link_after: full.recent(),
            link_usual: link.usual(),
            final_usual: final_usual.min(cap),
            final_worst: final_worst.min(cap * 0.95),
            final_best,
            costs,
            costs_best: least_cost(costs),
            costs_worst: self.costs_worst() + lost,
            costs_quiet: most_cost(costs),
            pause: self.costs.pause.as_secs_f64(),
            overhead: self
                .overhead
                .unwrap_or(self.costs.round_trip.as_secs_f64() + 0.2e-3),
            budget: self.goal.max_downtime.as_secs_f64(),
        }
    }

    /// What the guest would newly dirty, if it were not slowed down.
    fn natural(&self) -> f64 {
        if self.throttler.is_off() {
            self.rate.rate()
        } else {
            self.throttler.potential()
        }
    }

    /// When to slow the guest down, and how far: so that rounds shrink, so that they can shrink as far as the
    /// budget needs although each takes some time besides its bytes, and so that the deadline is met.
    fn plan(&mut self, now: &Outlook) -> ThrottlePlan {
        let room = now.room_if_quiet().max(0.0);
        let reachable = room / (room + now.overhead * now.link).max(1.0);
        if let Some(left) = self.left(now).filter(|_| self.link.is_known()) {
            let to_send = (now.dirty - room).max(0.0) / now.link;
            let share = (1.0 - to_send / (left * Self::PUNCTUALITY).max(1e-3)).max(0.0);
            // Chosen once: later only less, and only if it is noticeably less.
            if share < self.target - 0.05 {
                self.target = share;
            }
        }
        let target = self.target.min(0.8 * reachable);
        let limit = if self.overload || self.target < Self::TARGET {
            target
        } else {
            Self::LIMIT.min(0.9 * reachable)
        };
        ThrottlePlan {
            limit: limit.max(target),
            target,
            throttle: self.goal.throttle && self.goal.cpus > 0,
            settling: self.settling(),
        }
    }

    /// What holds the total time nine times in ten. How far the rest of a move may differ from what was seen of it was
    /// fitted to the moves in `tests/moves.txt`: the farther, the less was seen and the more of what the link carries the guest
    /// dirties, as rounds add that up; farther down than up, as a link that has just begun is slower than it will be. To it
    /// come the link's own variation and what the host takes away.
    fn total_interval(
        &self,
        now: &Outlook,
        plan: ThrottlePlan,
        model: Option<Model>,
        total: f64,
    ) -> Interval {
        let left = (total - now.at).max(0.0);
        let natural = model.map_or(now.natural, |model| now.natural_of(model));
        let (below, above) = if plan.throttle && natural > plan.limit * now.link {
            Self::UNSEEN_THROTTLED
        } else {
            let seen = self.link.count().max(1) as f64;
            let share = (now.natural / now.link.max(1.0)).min(0.5);
            (0.2 + 0.4 * share, 0.05 + 0.5 * share + 0.1 / seen.powf(0.75))
        };
        let varied = self.link.variation() / (left / Self::VARIES_OVER).max(1.0).powf(0.25);
        let lost = self.lateness.share();
        let low = left * (below + varied + 2.0 * lost).min(0.9) + 10e-3;
        let high = left * (above + varied + 1.5 * lost) + 10e-3;
        // No other than the likely one if there are no hot pages to be sent.
        let (_, most) = Self::HOT_FAULT;
        let shortest = now.with_faults_of(most).total(plan, model).unwrap_or(total);
        Interval::of(total.min(shortest) - low, total + high)
    }

    /// Until the guest was measured and slowed down, the dirty set does not shrink.
    fn settling(&self) -> f64 {
        if self.overload {
            0.0
        } else {
            2.0 * Throttler::EPOCH
        }
    }

    /// Seconds left before the switch has to come.
    fn left(&self, now: &Outlook) -> Option<f64> {
        self.goal
            .deadline
            .map(|deadline| deadline.as_secs_f64() - now.at - now.costs_quiet)
    }

    /// Whether the guest has to be slowed down sooner or later: it is already, or what was learnt at the end of
    /// round 1 says so. Then it is better to begin at once, and to need less of it.
    fn is_overload(&self, seen: &Observation<'_>, now: &Outlook) -> bool {
        let learnt = seen.round <= 1 && seen.end_of_round;
        let natural = self
            .model(seen)
            .filter(|_| learnt)
            .map(|model| now.natural_of(model));
        !self.throttler.is_off() || natural.is_some_and(|natural| natural > Self::LIMIT * now.link)
    }

    /// Round 1 is left alone: everything is sent at least once anyway. Unless the deadline is tight.
    fn demand(&self, now: &Outlook, plan: ThrottlePlan, first: bool) -> Option<Demand> {
        let early = self.target < Self::TARGET / 2.0;
        let wanted = plan.throttle && self.link.is_known() && (!first || early);
        wanted.then_some(Demand {
            limit: plan.limit * now.link_usual,
            target: plan.target * now.link_usual,
        })
    }

    fn judge(&mut self, seen: &Observation<'_>, now: &Outlook) -> Course {
        if self.missed.is_none() {
            let fits = now.fits() && self.is_in_time(now);
            if fits {
                return self.judge_fitting(seen, now);
            }
            self.missed = self.hopeless(seen, now).map(|reason| self.miss(reason, now));
        }
        match &self.missed {
            None => Course::Continue,
            Some(miss) if self.goal.on_miss == OnMiss::Fail => Course::Miss(miss.clone()),
            Some(_) => self.judge_fitting(seen, now),
        }
    }

    /// What would be allowed now may be better after the next round.
    fn judge_fitting(&self, seen: &Observation<'_>, now: &Outlook) -> Course {
        let next = now.next();
        let after = now.costs_worst + next.dirty / now.final_worst;
        let last_chance = self.left(now).is_some_and(|left| next.after + after > left)
            || (seen.end_of_round && seen.round >= self.goal.max_rounds)
            || (self.missed.is_none() && !self.throttler.is_off());
        if last_chance || self.is_still_settled(now) || !now.pays_to_go_on() {
            Course::Switch
        } else {
            Course::Continue
        }
    }

    /// Whether the observation before found that it is time, and the guest has not undone that since: what it wrote
    /// during a rehearsal it would write during the next one as well.
    fn is_still_settled(&self, now: &Outlook) -> bool {
        let downtime = now.downtime(now.dirty);
        self.settled
            .is_some_and(|settled| downtime <= Self::STEADY * settled + Self::STEADY_TIME)
    }

    fn is_in_time(&self, now: &Outlook) -> bool {
        self.left(now)
            .is_none_or(|left| now.dirty / now.final_worst <= left)
    }
}

/// Seconds of costs without the look at the log.
fn without_log(costs: Costs) -> f64 {
    let costs = Costs {
        final_log: Duration::ZERO,
        ..costs
    };
    costs.total().as_secs_f64()
}
