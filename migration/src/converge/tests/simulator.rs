//! A link and a guest, simulated block by block in steps of 0.1 ms.

use std::time::Duration;

use crate::converge::{Costs, Decision, Goal, Observation, Policy, Prediction, Verdict};
use crate::options::OnMiss;

pub(super) const MIB: u64 = 1 << 20;
/// What is tracked as one; a real page would only make the simulation slower.
const BLOCK: u64 = 64 << 10;
const STEP: f64 = 1e-4;
/// Between two observations inside a round.
const TICK: f64 = 0.01;
/// A vCPU is in the guest once in such a period.
const SLICE: f64 = 0.01;
/// Zero pages are only cleared from the log, this fast.
const ZERO: f64 = 6e10;
/// Writes to clean pages fault, which takes this long.
const FAULT: f64 = BLOCK as f64 / 1.2e9;
/// Writes to dirty pages do not.
const WRITE: f64 = BLOCK as f64 / 20e9;

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
pub(super) struct Vcpu {
    pub base: u64,
    pub size: u64,
    /// Bytes of pages per second that it writes; large for as fast as it can.
    pub rate: f64,
    pub pattern: Pattern,
    position: u64,
    credit: f64,
    /// Time that a fault took beyond the step it began in.
    owed: f64,
    pages: u64,
}

impl Vcpu {
    pub(super) fn new(base: u64, size: u64, rate: f64, pattern: Pattern) -> Self {
        Self {
            base: base / BLOCK,
            size: (size / BLOCK).max(1),
            rate,
            pattern,
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
pub(super) struct World {
    pub goal: Goal,
    pub memory: u64,
    /// The first so many bytes are not zero.
    pub populated: u64,
    pub link: f64,
    /// Share by which the link varies, in pieces of 20 ms.
    pub noise: f64,
    /// What a round takes besides its bytes.
    pub overhead: f64,
    pub vcpus: Vec<Vcpu>,
    /// From when on all of them write so many times as fast.
    pub change: Option<(f64, f64)>,
    /// Whether round 1 takes memory in a scattered order.
    pub scattered: bool,
    /// Whether the engine sends a piece without the cap at the start and at the end of each round.
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
pub(super) struct Outcome {
    pub verdict: Verdict,
    pub predicted: Prediction,
    pub downtime: f64,
    pub total: f64,
    pub rounds: u32,
    /// What was seen at each observation.
    pub history: Vec<Point>,
    /// Bytes of pages written by the guest before the switch.
    pub work: f64,
    /// Largest share of time off, per vCPU.
    pub most_off: Vec<f64>,
    pub dirty: f64,
    pub missed: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Point {
    pub at: f64,
    pub off: f64,
    pub dirty: f64,
    pub prediction: Prediction,
}

impl Outcome {
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

impl World {
    pub(super) fn new(goal: Goal, vcpus: Vec<Vcpu>) -> Self {
        Self {
            goal,
            memory: 2048 * MIB,
            populated: 512 * MIB,
            link: 3.5e9,
            noise: 0.05,
            overhead: 0.5e-3,
            vcpus,
            change: None,
            scattered: false,
            bursts: false,
            ring: false,
            told: Some(Costs::default()),
            costs_factor: 1.0,
            seed: 1,
        }
    }

    /// Lets the policy decide.
    pub(super) fn run(&self) -> Outcome {
        let mut policy = Policy::new(self.goal.clone());
        if let Some(told) = self.told {
            policy.set_costs(told);
        }
        let mut run = Run::new(self);
        let mut outcome: Option<Outcome> = None;
        let (mut most_off, mut history) = (vec![0.0_f64; self.goal.cpus], Vec::new());
        while outcome.is_none() {
            let start = run.at;
            let end_of_round = run.advance();
            if self.bursts && (start == 0.0 || end_of_round) {
                let seconds = (4 * MIB) as f64 / run.speed(None);
                policy.burst(4 * MIB, Duration::from_secs_f64(seconds));
            }
            let decision = run.observe(&mut policy, end_of_round);
            for (cpu, most) in most_off.iter_mut().enumerate() {
                *most = most.max(decision.throttle.of(cpu));
            }
            let (off, prediction) = (decision.throttle.mean(), decision.prediction);
            history.push(Point {
                at: run.at,
                off,
                dirty: run.dirty(),
                prediction,
            });
            run.off = (0..self.vcpus.len())
                .map(|cpu| decision.throttle.of(cpu))
                .collect();
            if decision.verdict != Verdict::Continue {
                let missed = policy.missed().is_some();
                outcome = Some(run.end(decision, missed));
            } else if end_of_round {
                run.begin_round();
            }
            assert!(run.at < 600.0, "never ends");
        }
        let outcome = outcome.expect("the loop has ended");
        Outcome {
            most_off,
            history,
            ..outcome
        }
    }

    /// Holds a constant duty until so many bytes are left. Returns the time that it takes, if not too long.
    pub(super) fn time_at_duty(&self, duty: f64, dirty: f64, longest: f64) -> Option<f64> {
        let mut run = Run::new(self);
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

struct Run<'a> {
    world: &'a World,
    at: f64,
    round: u32,
    dirty: Vec<bool>,
    todo: Vec<bool>,
    dirty_blocks: u64,
    todo_blocks: u64,
    cursor: usize,
    order: Vec<usize>,
    credit: f64,
    copied: u64,
    copied_data: u64,
    vcpus: Vec<Vcpu>,
    off: Vec<f64>,
    work: f64,
    random: u64,
    quality: f64,
}

impl<'a> Run<'a> {
    fn new(world: &'a World) -> Self {
        let blocks = (world.memory / BLOCK) as usize;
        Self {
            world,
            at: 0.0,
            round: 1,
            dirty: vec![true; blocks],
            todo: vec![true; blocks],
            dirty_blocks: blocks as u64,
            todo_blocks: blocks as u64,
            cursor: 0,
            order: order(blocks, (world.populated / BLOCK) as usize, world.scattered),
            credit: 0.0,
            copied: 0,
            copied_data: 0,
            vcpus: world.vcpus.clone(),
            off: vec![0.0; world.vcpus.len()],
            work: 0.0,
            random: world.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            quality: 1.0,
        }
    }

    fn dirty(&self) -> f64 {
        (self.dirty_blocks * BLOCK) as f64
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 11
    }

    /// Until the next observation; whether the round has ended.
    fn advance(&mut self) -> bool {
        let until = self.at + TICK;
        while self.at < until {
            self.step(self.speed(self.world.goal.bandwidth));
            if self.todo_blocks == 0 {
                return true;
            }
        }
        false
    }

    fn speed(&self, cap: Option<f64>) -> f64 {
        (self.world.link * self.quality).min(cap.unwrap_or(f64::INFINITY))
    }

    fn step(&mut self, speed: f64) {
        self.at += STEP;
        if (self.at / 0.02) as u64 != ((self.at - STEP) / 0.02) as u64 {
            let share = (self.random() % 2001) as f64 / 1000.0 - 1.0;
            self.quality = 1.0 + self.world.noise * share;
        }
        for cpu in 0..self.vcpus.len() {
            self.guest(cpu);
        }
        self.credit += speed * STEP;
        while self.credit > 0.0 && self.todo_blocks > 0 {
            self.send(speed);
        }
        self.credit = self.credit.min(0.0);
    }

    fn send(&mut self, speed: f64) {
        while !self.todo[self.order[self.cursor]] {
            self.cursor += 1;
        }
        let block = self.order[self.cursor];
        (self.todo[block], self.dirty[block]) = (false, false);
        self.todo_blocks -= 1;
        self.dirty_blocks -= 1;
        self.copied += BLOCK;
        let zero = block as u64 * BLOCK >= self.world.populated;
        self.credit -= if zero {
            BLOCK as f64 * speed / ZERO
        } else {
            BLOCK as f64
        };
        self.copied_data += if zero { 0 } else { BLOCK };
    }

    fn guest(&mut self, cpu: usize) {
        let phase = self.at % SLICE;
        let factor = self
            .world
            .change
            .map_or(1.0, |(at, factor)| if self.at >= at { factor } else { 1.0 });
        if phase < SLICE * self.off[cpu] - STEP / 2.0 {
            return;
        }
        let mut time = STEP - self.vcpus[cpu].owed;
        let rate = self.vcpus[cpu].rate * factor;
        let credit = self.vcpus[cpu].credit + rate * STEP;
        self.vcpus[cpu].credit = credit.min(rate * STEP + 2.0 * BLOCK as f64);
        while time > 0.0 && self.vcpus[cpu].credit >= BLOCK as f64 {
            let random = self.random();
            let vcpu = &mut self.vcpus[cpu];
            let place = match vcpu.pattern {
                Pattern::Sweep => vcpu.position,
                Pattern::Random => random % vcpu.size,
            };
            vcpu.position = (place + 1) % vcpu.size;
            vcpu.credit -= BLOCK as f64;
            let block = (vcpu.base + place) as usize;
            time -= WRITE;
            self.work += BLOCK as f64;
            if !self.dirty[block] {
                self.dirty[block] = true;
                self.dirty_blocks += 1;
                vcpu.pages += BLOCK / 4096;
                time -= FAULT - WRITE;
            }
        }
        self.vcpus[cpu].owed = (-time).max(0.0);
    }

    fn observe(&self, policy: &mut Policy, end_of_round: bool) -> Decision {
        let by_vcpu: Vec<u64> = self.vcpus.iter().map(|vcpu| vcpu.pages).collect();
        let populated = (self.world.populated / BLOCK) as usize;
        let zero = if self.round == 1 {
            self.todo.len() - populated.max(self.cursor).min(self.todo.len())
        } else {
            0
        };
        policy.observe(&Observation {
            at: Duration::from_secs_f64(self.at),
            round: self.round,
            end_of_round,
            unsent: self.todo_blocks * BLOCK,
            unsent_zero: (zero as u64).min(self.todo_blocks) * BLOCK,
            dirty: self.dirty_blocks * BLOCK,
            copied: self.copied,
            copied_data: self.copied_data,
            wire: self.copied_data + self.copied / 4096,
            in_flight: 0,
            by_vcpu: if self.world.ring { &by_vcpu } else { &[] },
        })
    }

    fn begin_round(&mut self) {
        self.round += 1;
        let until = self.at + self.world.overhead;
        while self.at < until {
            self.step(0.0);
        }
        self.todo.clone_from(&self.dirty);
        self.todo_blocks = self.dirty_blocks;
        self.cursor = 0;
    }

    /// The switch: the guest writes on while its vCPUs are taken out; then all is sent.
    fn end(&mut self, decision: Decision, missed: bool) -> Outcome {
        let costs = self.world.told.unwrap_or_default();
        let factor = self.world.costs_factor;
        let (work, paused) = (self.work, self.at);
        while self.at < paused + costs.pause.as_secs_f64() * factor {
            self.step(0.0);
        }
        self.todo.clone_from(&self.dirty);
        (self.todo_blocks, self.cursor) = (self.dirty_blocks, 0);
        let dirty = self.dirty();
        let copying = self.at;
        self.off = vec![2.0; self.vcpus.len()];
        while self.todo_blocks > 0 {
            self.step(self.speed(self.world.goal.final_bandwidth));
        }
        // The last step is used in part only.
        let copy = (self.at - copying - STEP / 2.0).max(0.0);
        let downtime = costs.total().as_secs_f64() * factor + copy;
        Outcome {
            verdict: decision.verdict,
            predicted: decision.prediction,
            downtime,
            total: paused + downtime,
            rounds: self.round,
            work,
            most_off: Vec::new(),
            history: Vec::new(),
            dirty,
            missed,
        }
    }
}

/// The order in which blocks are sent: populated ones first, in pieces of 4 MiB if they are scattered.
fn order(blocks: usize, populated: usize, scattered: bool) -> Vec<usize> {
    let pieces = populated / 64;
    if !scattered || pieces < 2 {
        return (0..blocks).collect();
    }
    let stride = (1..pieces)
        .rev()
        .find(|&n| n * 1000 <= pieces * 618 && gcd(n, pieces) == 1)
        .unwrap_or(1);
    let piece = |n: usize| (n * stride % pieces) * 64;
    let first = (0..pieces).flat_map(|n| piece(n)..piece(n) + 64);
    first.chain(pieces * 64..blocks).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
