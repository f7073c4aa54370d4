//! The simulation itself: block by block, in steps of 0.1 ms.

use std::time::Duration;

use super::simulator::{Pattern, SimulatedEnd, SimulatedVcpu, Simulation};
use crate::converge::{Advice, Observation, Policy};

/// What is tracked as one; a real page would only make the simulation slower.
pub(super) const BLOCK: u64 = 64 << 10;
const STEP: f64 = 1e-4;
/// Between two observations inside a round.
const TICK: f64 = 0.01;
/// A vCPU is in the guest once in such a period.
const SLICE: f64 = 0.01;
/// What a rehearsal takes.
const REHEARSAL: f64 = 1e-3;
/// Writes to clean pages fault, which takes this long.
const FAULT: f64 = BLOCK as f64 / 1.2e9;
/// Writes to dirty pages do not.
const WRITE: f64 = BLOCK as f64 / 20e9;

pub(super) struct SimulationRun<'a> {
    world: &'a Simulation,
    pub(super) at: f64,
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
    vcpus: Vec<SimulatedVcpu>,
    pub(super) off: Vec<f64>,
    work: f64,
    random: u64,
    quality: f64,
}

impl<'a> SimulationRun<'a> {
    pub(super) fn new(world: &'a Simulation) -> Self {
        let blocks = (world.memory / BLOCK) as usize;
        // The engine leaves out what was never touched.
        let populated = (world.populated / BLOCK) as usize;
        let pages: Vec<bool> = (0..blocks).map(|block| block < populated).collect();
        Self {
            world,
            at: 0.0,
            round: 1,
            dirty: pages.clone(),
            todo: pages,
            dirty_blocks: populated as u64,
            todo_blocks: populated as u64,
            cursor: 0,
            order: order(world),
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

    pub(super) fn dirty(&self) -> f64 {
        (self.dirty_blocks * BLOCK) as f64
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 11
    }

    /// Until the next observation; whether the round has ended.
    pub(super) fn advance(&mut self) -> bool {
        let until = self.at + TICK;
        while self.at < until {
            self.step(self.speed(self.world.goal.bandwidth));
            if self.todo_blocks == 0 {
                return true;
            }
        }
        false
    }

    pub(super) fn speed(&self, cap: Option<f64>) -> f64 {
        let factor = self
            .world
            .link_change
            .map_or(1.0, |(at, factor)| if self.at >= at { factor } else { 1.0 });
        let resting = if self.rests() { self.world.resting } else { 1.0 };
        (self.world.link * factor * resting * self.quality).min(cap.unwrap_or(f64::INFINITY))
    }

    /// Whether some streams rest: in round 1, after they all have sent for a while.
    fn rests(&self) -> bool {
        self.round == 1 && self.todo_blocks > 0 && self.world.resting < 1.0 && self.at > 0.035
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
            self.send();
        }
        self.credit = self.credit.min(0.0);
    }

    fn send(&mut self) {
        while !self.todo[self.order[self.cursor]] {
            self.cursor += 1;
        }
        let block = self.order[self.cursor];
        (self.todo[block], self.dirty[block]) = (false, false);
        self.todo_blocks -= 1;
        self.dirty_blocks -= 1;
        self.copied += BLOCK;
        self.credit -= BLOCK as f64;
        self.copied_data += BLOCK;
    }

    fn guest(&mut self, cpu: usize) {
        let phase = self.at % SLICE;
        let factor = self
            .world
            .change
            .map_or(1.0, |(at, factor)| if self.at >= at { factor } else { 1.0 });
        if phase < SLICE * self.off[cpu] - STEP / 2.0 {
            let vcpu = &mut self.vcpus[cpu];
            vcpu.credit += if vcpu.catches_up {
                vcpu.rate * factor * STEP
            } else {
                0.0
            };
            return;
        }
        let mut time = STEP - self.vcpus[cpu].owed;
        let rate = self.vcpus[cpu].rate * factor;
        let credit = self.vcpus[cpu].credit + rate * STEP;
        let most = if self.vcpus[cpu].catches_up {
            rate
        } else {
            rate * STEP + 2.0 * BLOCK as f64
        };
        self.vcpus[cpu].credit = credit.min(most);
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

    pub(super) fn observe(&self, policy: &mut Policy, end_of_round: bool) -> Advice {
        let by_vcpu: Vec<u64> = self.vcpus.iter().map(|vcpu| vcpu.pages).collect();
        let todo = (0..self.todo.len()).filter(|block| self.todo[*block]);
        let put_off = todo.filter(|block| self.round == 1 && is_hot(self.world, *block));
        policy.observe(&Observation {
            at: Duration::from_secs_f64(self.at),
            round: self.round,
            end_of_round,
            unsent: self.todo_blocks * BLOCK,
            hot: self.world.hot.1,
            put_off: put_off.count() as u64 * BLOCK,
            all_streams: !self.rests(),
            dirty: self.dirty_blocks * BLOCK,
            copied: self.copied,
            copied_data: self.copied_data,
            wire: self.copied_data + self.copied / 4096,
            late: Duration::ZERO,
            by_vcpu: if self.world.ring { &by_vcpu } else { &[] },
        })
    }

    /// Time in which nothing is sent.
    pub(super) fn rehearse(&mut self) {
        let until = self.at + REHEARSAL;
        while self.at < until {
            self.step(0.0);
        }
    }

    pub(super) fn begin_round(&mut self) {
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
    pub(super) fn end(&mut self, advice: Advice, missed: bool) -> SimulatedEnd {
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
        SimulatedEnd {
            course: advice.course,
            predicted: advice.prediction,
            downtime,
            total: paused + downtime,
            rounds: self.round,
            work,
            most_off: Vec::new(),
            history: Vec::new(),
            dirty,
            missed,
            second_looks: 0,
        }
    }
}

/// The order in which blocks are sent: populated ones first, in pieces of 4 MiB if they are scattered; hot ones last.
fn order(world: &Simulation) -> Vec<usize> {
    let blocks = (world.memory / BLOCK) as usize;
    let pieces = (world.populated / BLOCK) as usize / 64;
    let mut order: Vec<usize> = if !world.scattered || pieces < 2 {
        (0..blocks).collect()
    } else {
        let stride = (1..pieces)
            .rev()
            .find(|&n| n * 1000 <= pieces * 618 && gcd(n, pieces) == 1)
            .unwrap_or(1);
        let piece = |n: usize| (n * stride % pieces) * 64;
        let first = (0..pieces).flat_map(|n| piece(n)..piece(n) + 64);
        first.chain(pieces * 64..blocks).collect()
    };
    order.sort_by_key(|block| is_hot(world, *block));
    order
}

fn is_hot(world: &Simulation, block: usize) -> bool {
    let (base, size) = world.hot;
    (base..base + size).contains(&(block as u64 * BLOCK))
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
