//! How far to slow the guest down: a target for the rate of newly dirtied pages, held by feedback.
//!
//! The target is a share of the bandwidth, chosen once and then kept, so that the dirty set shrinks at a
//! constant speed and the guest never has to be stopped nearly altogether at the end. The rate is measured over
//! epochs that are several slices long; what a vCPU would dirty if it ran all the time (its *potential*) is the
//! measured rate over the share of time that it ran. The target is then dealt out like water: everybody gets
//! the same level, and who stays below it by himself is not slowed down at all.

use crate::options::MAX_THROTTLE;

/// The largest share of time that a vCPU is held out of the guest.
pub(crate) const FLOOR: f64 = MAX_THROTTLE;

/// The share of time that each vCPU is held out of the guest, from 0 to [`FLOOR`].
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ThrottleShares {
    off: Vec<f64>,
}

impl ThrottleShares {
    /// For one vCPU.
    pub(crate) fn of(&self, cpu: usize) -> f64 {
        self.off.get(cpu).copied().unwrap_or(0.0)
    }

    /// The mean over all vCPUs.
    #[cfg(test)]
    pub(crate) fn mean(&self) -> f64 {
        self.off.iter().sum::<f64>() / self.off.len().max(1) as f64
    }

    /// Whether nobody is slowed down.
    #[cfg(test)]
    pub(crate) fn is_off(&self) -> bool {
        self.off.iter().all(|&off| off <= 0.0)
    }
}

/// The feedback loop.
#[derive(Clone, Debug)]
pub(super) struct Throttler {
    cpus: usize,
    /// One per vCPU where it is known who dirties, else one for all.
    lanes: Vec<VcpuShare>,
    epoch: Epoch,
    /// Bytes dirtied beyond the target, to be made up for.
    excess: f64,
}

#[derive(Clone, Copy, Debug)]
struct VcpuShare {
    /// Share of time in the guest.
    on: f64,
    /// Bytes per second if it were 1.
    potential: f64,
    /// The vCPU's counter when the epoch began.
    pages: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Epoch {
    elapsed: f64,
    dirtied: f64,
}

/// What the rate may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demand {
    /// Above this the guest is slowed down. Bytes per second.
    pub limit: f64,
    /// To this. Bytes per second.
    pub target: f64,
}

impl Throttler {
    /// Several slices of at most 10 ms, so that their phase does not matter.
    pub(super) const EPOCH: f64 = 0.08;
    /// Smaller changes are noise.
    const STEP: f64 = 0.03;

    pub(super) fn new(cpus: usize) -> Self {
        Self {
            cpus,
            lanes: vec![VcpuShare::new(0)],
            epoch: Epoch::default(),
            excess: 0.0,
        }
    }

    /// Takes a step; at the end of an epoch it adapts the throttle to `demand` (`None`: no throttle).
    pub(super) fn step(&mut self, elapsed: f64, dirtied: f64, by_vcpu: &[u64], demand: Option<Demand>) {
        if by_vcpu.len() > 1 && by_vcpu.len() == self.cpus && self.lanes.len() != self.cpus {
            let on = self.on();
            self.lanes = by_vcpu
                .iter()
                .map(|&pages| VcpuShare {
                    on,
                    ..VcpuShare::new(pages)
                })
                .collect();
            self.epoch = Epoch::default();
            return;
        }
        self.epoch.elapsed += elapsed;
        self.epoch.dirtied += dirtied;
        if demand.is_none() {
            self.lanes.iter_mut().for_each(|lane| lane.on = 1.0);
        }
        if self.epoch.elapsed < Self::EPOCH {
            return;
        }
        let excess = demand.filter(|demand| demand.limit <= demand.target);
        self.excess = excess.map_or(0.0, |demand| {
            let excess = self.excess + self.epoch.dirtied - demand.target * self.epoch.elapsed;
            excess.clamp(-0.1 * demand.target, 0.3 * demand.target)
        });
        self.measure(by_vcpu);
        if let Some(demand) = demand {
            self.adapt(demand);
        }
    }

    /// Lets everybody run.
    pub(super) fn release(&mut self) {
        self.lanes.iter_mut().for_each(|lane| lane.on = 1.0);
    }

    /// Bytes per second that the guest would dirty if it were not slowed down.
    pub(super) fn potential(&self) -> f64 {
        self.lanes.iter().map(|lane| lane.potential).sum()
    }

    /// The mean share of time in the guest.
    pub(super) fn on(&self) -> f64 {
        self.lanes.iter().map(|lane| lane.on).sum::<f64>() / self.lanes.len().max(1) as f64
    }

    pub(super) fn is_off(&self) -> bool {
        self.lanes.iter().all(|lane| lane.on >= 1.0)
    }

    /// Whether everybody who dirties is at the floor.
    pub(super) fn is_exhausted(&self) -> bool {
        let share = self.potential() * 0.02;
        let exhausted = |lane: &VcpuShare| lane.on <= (1.0 - FLOOR) * 1.01 || lane.potential <= share;
        !self.is_off() && self.lanes.iter().all(exhausted)
    }

    pub(super) fn throttle(&self) -> ThrottleShares {
        let off = |cpu: usize| {
            let lane = self.lanes.get(cpu).or(self.lanes.first());
            lane.map_or(0.0, |lane| (1.0 - lane.on).clamp(0.0, FLOOR))
        };
        ThrottleShares {
            off: (0..self.cpus).map(off).collect(),
        }
    }

    /// Ends an epoch: what was seen becomes each lane's potential.
    fn measure(&mut self, by_vcpu: &[u64]) {
        let rate = self.epoch.dirtied / self.epoch.elapsed;
        self.epoch = Epoch::default();
        if let [all] = self.lanes.as_mut_slice() {
            all.learn(rate);
            return;
        }
        let pages = |cpu: usize| by_vcpu.get(cpu).copied();
        let fresh = |(cpu, lane): (usize, &VcpuShare)| {
            pages(cpu).unwrap_or(lane.pages).saturating_sub(lane.pages) as f64
        };
        let shares: Vec<f64> = self.lanes.iter().enumerate().map(fresh).collect();
        let sum = shares.iter().sum::<f64>();
        let even = 1.0 / self.lanes.len().max(1) as f64;
        for (cpu, (lane, share)) in self.lanes.iter_mut().zip(shares).enumerate() {
            lane.learn(rate * if sum > 0.0 { share / sum } else { even });
            lane.pages = pages(cpu).unwrap_or(lane.pages);
        }
    }

    fn adapt(&mut self, demand: Demand) {
        if self.potential() <= demand.limit {
            return self.release();
        }
        // Made up for within about a second, so that the dirty set shrinks as fast as planned.
        let level = self.level(demand.target - self.excess);
        for lane in &mut self.lanes {
            let on = (level / lane.potential.max(1.0)).clamp(1.0 - FLOOR, 1.0);
            if (on - lane.on).abs() > Self::STEP * lane.on || on == 1.0 {
                lane.on = on;
            }
        }
    }

    /// The rate at which to cut every lane so that they dirty `target` together.
    fn level(&self, target: f64) -> f64 {
        let mut potentials: Vec<f64> = self.lanes.iter().map(|lane| lane.potential).collect();
        potentials.sort_by(f64::total_cmp);
        let mut left = target;
        let count = potentials.len();
        for (n, potential) in potentials.into_iter().enumerate() {
            let level = left / (count - n) as f64;
            if potential >= level {
                return level;
            }
            left -= potential;
        }
        f64::INFINITY
    }
}

impl VcpuShare {
    fn new(pages: u64) -> Self {
        Self {
            on: 1.0,
            potential: 0.0,
            pages,
        }
    }

    /// Up at once where it matters, and down by degrees: a guest that pauses for a moment is not calm yet.
    fn learn(&mut self, rate: f64) {
        let seen = rate / self.on;
        self.potential = match seen / self.potential.max(1.0) {
            ratio if ratio > 1.25 => seen,
            ratio if ratio > 0.8 => f64::midpoint(self.potential, seen),
            ratio if ratio > 0.25 => seen.max(self.potential * 0.8),
            _ => seen.max(self.potential * 0.4),
        };
    }
}
