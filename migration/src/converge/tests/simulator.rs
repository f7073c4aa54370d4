//! A link and a guest to simulate, and what comes out.

use std::time::Duration;

use super::run::{BLOCK, SimulationRun};
use crate::converge::{Costs, Course, Goal, Policy, Prediction};
use crate::options::OnMiss;

pub(super) const MIB: u64 = 1 << 20;

/// How a vCPU picks the next page.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pattern {
    /// One after the other.
    Sweep,
    /// Any.
    Random,
}

/// A vCPU that writes.
#[derive(Clone, Debug)]
pub(super) struct SimulatedVcpu {
    pub base: u64,
    pub size: u64,
    /// Bytes of pages per second that it writes; large for as fast as it can.
    pub rate: f64,
    pub pattern: Pattern,
    /// Whether it makes up for time lost, as a guest does that paces itself by a clock.
    pub catches_up: bool,
    pub(super) position: u64,
    pub(super) credit: f64,
    /// Time that a fault took beyond the step it began in.
    pub(super) owed: f64,
    pub(super) pages: u64,
}

impl SimulatedVcpu {
    pub(super) fn new(base: u64, size: u64, rate: f64, pattern: Pattern) -> Self {
        Self {
            base: base / BLOCK,
            size: (size / BLOCK).max(1),
            rate,
            pattern,
            catches_up: false,
            position: 0,
            credit: 0.0,
            owed: 0.0,
            pages: 0,
        }
    }

    /// Where it begins.
    pub(super) fn start(&mut self, position: u64) {
        self.position = position % self.size;
    }
}

#[derive(Clone, Debug)]
pub(super) struct Simulation {
    pub goal: Goal,
    pub memory: u64,
    /// The first so many bytes are not zero.
    pub populated: u64,
    pub link: f64,
    /// Share by which the link varies, in pieces of 20 ms.
    pub noise: f64,
    /// What a round takes besides its bytes.
    pub overhead: f64,
    pub vcpus: Vec<SimulatedVcpu>,
    /// From when on all of them write so many times as fast.
    pub change: Option<(f64, f64)>,
    /// From when on the link is so many times as fast.
    pub link_change: Option<(f64, f64)>,
    /// Whether round 1 takes memory in a scattered order.
    pub scattered: bool,
    /// Where hot pages begin and how many bytes of them the engine has found, which round 1 sends last.
    pub hot: (u64, u64),
    /// What is left of the link's speed in round 1, where streams rest.
    pub resting: f64,
    /// Whether the engine sends a piece without the cap at the start of each round.
    pub bursts: bool,
    /// Whether the dirty ring tells who writes.
    pub ring: bool,
    /// The costs that the policy is told, if any.
    pub told: Option<Costs>,
    /// What they really are, in parts of what was told.
    pub costs_factor: f64,
    pub seed: u64,
}

/// What came out. Seconds and bytes.
#[derive(Clone, Debug)]
pub(super) struct SimulatedEnd {
    pub course: Course,
    pub predicted: Prediction,
    pub downtime: f64,
    pub total: f64,
    pub rounds: u32,
    /// What was seen at each observation.
    pub history: Vec<SimulatedPoint>,
    /// Bytes of pages written by the guest before the switch.
    pub work: f64,
    /// Largest share of time off, per vCPU.
    pub most_off: Vec<f64>,
    pub dirty: f64,
    pub missed: bool,
    /// How often it looked like the moment to switch.
    pub second_looks: u32,
}

#[derive(Clone, Debug)]
pub(super) struct SimulatedPoint {
    pub at: f64,
    pub off: f64,
    pub prediction: Prediction,
}

impl SimulatedEnd {
    /// The prediction of the total time when a fifth of it had passed.
    pub(super) fn predicted_total(&self) -> Option<f64> {
        let early = self
            .history
            .iter()
            .take_while(|point| point.at <= self.total * 0.2)
            .last();
        let point = early.or(self.history.first())?;
        point.prediction.total.map(|total| total.as_secs_f64())
    }

    /// The same when a fifth of the time predicted had passed, which is what can be told meanwhile.
    pub(super) fn predicted_total_midway(&self) -> Option<f64> {
        let total = self.predicted_midway()?.total;
        total.map(|total| total.as_secs_f64())
    }

    /// What was predicted then.
    pub(super) fn predicted_midway(&self) -> Option<&Prediction> {
        let mut points = self.history.iter();
        let midway = points.find(|point| {
            let total = point.prediction.total;
            total.is_some_and(|total| point.at >= 0.2 * total.as_secs_f64())
        });
        midway.map(|point| &point.prediction)
    }
}

pub(super) fn goal(max_downtime_ms: u64) -> Goal {
    Goal {
        max_downtime: Duration::from_millis(max_downtime_ms),
        deadline: None,
        on_miss: OnMiss::Fail,
        final_bandwidth: None,
        bandwidth: None,
        throttle: true,
        cpus: 1,
        max_rounds: 100,
    }
}

impl Simulation {
    pub(super) fn new(goal: Goal, vcpus: Vec<SimulatedVcpu>) -> Self {
        Self {
            goal,
            memory: 2048 * MIB,
            populated: 512 * MIB,
            link: 3.5e9,
            noise: 0.05,
            overhead: 0.5e-3,
            vcpus,
            change: None,
            link_change: None,
            scattered: false,
            hot: (0, 0),
            resting: 1.0,
            bursts: false,
            ring: false,
            told: Some(Costs::default()),
            costs_factor: 1.0,
            seed: 1,
        }
    }

    /// Lets the policy decide.
    pub(super) fn run(&self) -> SimulatedEnd {
        let mut policy = Policy::new(self.goal.clone());
        if let Some(told) = self.told {
            policy.set_costs(&[told]);
        }
        let mut run = SimulationRun::new(self);
        let mut outcome: Option<SimulatedEnd> = None;
        let (mut most_off, mut history) = (vec![0.0_f64; self.goal.cpus], Vec::new());
        let mut second_looks = 0;
        while outcome.is_none() {
            let (start, looked_before) = (run.at, second_looks);
            let end_of_round = run.advance();
            if self.bursts && (start == 0.0 || end_of_round) {
                let seconds = (4 * MIB) as f64 / run.speed(None);
                policy.burst(4 * MIB, Duration::from_secs_f64(seconds));
            }
            let mut advice = run.observe(&mut policy, end_of_round);
            if advice.course == Course::Switch {
                // The engine rehearses what the pause will cost, and looks once more.
                run.rehearse();
                advice = run.observe(&mut policy, true);
                second_looks += 1;
            }
            for (cpu, most) in most_off.iter_mut().enumerate() {
                *most = most.max(advice.throttle.of(cpu));
            }
            let (off, prediction) = (advice.throttle.mean(), advice.prediction);
            history.push(SimulatedPoint {
                at: run.at,
                off,
                prediction,
            });
            run.off = (0..self.vcpus.len()).map(|cpu| advice.throttle.of(cpu)).collect();
            if advice.course != Course::Continue {
                let missed = policy.missed().is_some();
                outcome = Some(run.end(advice, missed));
            } else if end_of_round || second_looks > looked_before {
                run.begin_round();
            }
            assert!(run.at < 600.0, "never ends");
        }
        let outcome = outcome.expect("the loop has ended");
        SimulatedEnd {
            most_off,
            history,
            second_looks,
            ..outcome
        }
    }

    /// Holds a constant duty until so many bytes are left. Returns the time that it takes, if not too long.
    pub(super) fn time_at_duty(&self, duty: f64, dirty: f64, longest: f64) -> Option<f64> {
        let mut run = SimulationRun::new(self);
        run.off = vec![1.0 - duty; self.vcpus.len()];
        while run.at < longest {
            let end_of_round = run.advance();
            if run.dirty() <= dirty {
                return Some(run.at);
            }
            if end_of_round {
                run.begin_round();
            }
        }
        None
    }
}
