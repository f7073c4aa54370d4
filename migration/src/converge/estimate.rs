//! From counters to rates: steps between observations, bandwidth, dirty rate.

use std::collections::VecDeque;

use super::Observation;

/// What happened between two observations. Bytes and seconds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ObservedStep {
    /// Seconds since the observation before.
    pub elapsed: f64,
    /// Bytes that arrived at the peer.
    pub delivered: f64,
    /// Pages sent with their content.
    pub data: f64,
    /// Pages sent as zero.
    pub zero: f64,
    /// Pages that the guest newly dirtied.
    pub dirtied: f64,
    /// Whether the step ends a round.
    pub end_of_round: bool,
}

/// Turns the counters of observations into steps. A counter that goes backwards counts as standing still.
#[derive(Clone, Debug, Default)]
pub(super) struct Meter {
    /// The time before the first observation, of a handshake say, is no part of any step.
    at: Option<f64>,
    delivered: f64,
    data: f64,
    zero: f64,
    /// Pages ever marked: dirty now, or cleared since.
    marked: Option<f64>,
}

impl Meter {
    pub(super) fn step(&mut self, seen: &Observation<'_>) -> ObservedStep {
        let marked_now = seen.dirty as f64 + seen.copied as f64;
        let marked = self.marked.get_or_insert(marked_now);
        let now = seen.at.as_secs_f64();
        ObservedStep {
            elapsed: advance(self.at.get_or_insert(now), now),
            delivered: advance(&mut self.delivered, seen.wire as f64),
            data: advance(&mut self.data, seen.copied_data as f64),
            zero: advance(
                &mut self.zero,
                seen.copied.saturating_sub(seen.copied_data) as f64,
            ),
            dirtied: advance(marked, marked_now),
            end_of_round: seen.end_of_round,
        }
    }

    /// Page bytes per byte on the wire: above 1 where compression pays.
    pub(super) fn page_ratio(&self) -> f64 {
        if self.delivered < MIN_SAMPLE || self.data < MIN_SAMPLE {
            return 1.0;
        }
        (self.data / self.delivered).clamp(0.1, 100.0)
    }
}

/// Raises a counter, returns by how much.
fn advance(counter: &mut f64, to: f64) -> f64 {
    let by = (to - *counter).max(0.0);
    *counter += by;
    by
}

/// Less than this says more about latency than about bandwidth.
const MIN_SAMPLE: f64 = 64.0 * 1024.0;
/// Shorter than this, it says more about buffers.
const MIN_TIME: f64 = 2e-3;

/// How fast the link is: percentiles of recent samples. Page bytes per second.
#[derive(Clone, Debug, Default)]
pub(super) struct Bandwidth {
    samples: VecDeque<f64>,
    /// Seconds that the link was busy so far.
    busy: f64,
}

impl Bandwidth {
    /// About two thirds of a second of observations.
    const WINDOW: usize = 64;
    /// Connections open their windows by and by, and caches are cold: seconds that say too little.
    const OPENING: f64 = 0.01;
    /// Until something was measured: a 1 Gbit/s network, so that the prediction errs on the safe side.
    pub(super) const ASSUMED: f64 = 125e6;

    /// Takes a step during which the link was busy. `pages` is the ratio of page bytes to wire bytes.
    pub(super) fn add(&mut self, step: &ObservedStep, pages: f64, round_trip: f64) {
        // Scanning zero pages leaves the link idle, and so does the wait at the end of a short round.
        let scanning = step.zero > step.data / 4.0;
        let waiting = step.end_of_round && step.elapsed < 8.0 * round_trip.max(MIN_TIME / 4.0);
        if step.elapsed >= MIN_TIME && step.delivered >= MIN_SAMPLE && !scanning && !waiting {
            if self.busy >= Self::OPENING {
                self.push(step.delivered * pages / step.elapsed);
            }
            self.busy += step.elapsed;
        }
    }

    /// Takes a rate that was measured elsewhere.
    pub(super) fn push(&mut self, rate: f64) {
        if !rate.is_finite() || rate <= 0.0 {
            return;
        }
        if self.samples.len() == Self::WINDOW {
            self.samples.pop_front();
        }
        self.samples.push_back(rate);
    }

    /// How many samples there are, up to as many as are remembered.
    pub(super) fn count(&self) -> usize {
        self.samples.len()
    }

    pub(super) fn is_known(&self) -> bool {
        !self.samples.is_empty()
    }

    /// What a long copy runs at.
    pub(super) fn median(&self) -> f64 {
        self.percentile(0.5)
    }

    /// What is left of one will run at: the mean of the later half, as the first tenth of a second is often slower
    /// than what follows.
    pub(super) fn recent(&self) -> f64 {
        let (skipped, count) = (self.samples.len() / 2, self.samples.len().div_ceil(2));
        if count == 0 {
            return Self::ASSUMED;
        }
        self.samples.iter().skip(skipped).sum::<f64>() / count as f64
    }

    /// What a copy reaches that little gets in the way of.
    pub(super) fn good(&self) -> f64 {
        self.percentile(0.75)
    }

    /// What a copy can count on.
    pub(super) fn usual(&self) -> f64 {
        self.percentile(0.25)
    }

    /// What a copy reaches that nothing gets in the way of.
    pub(super) fn best(&self) -> f64 {
        self.percentile(0.9)
    }

    /// By how much the speed over some 80 ms differs from its mean, as a part of that (a standard deviation).
    pub(super) fn variation(&self) -> f64 {
        let samples: Vec<f64> = self.samples.iter().copied().collect();
        let means = samples
            .chunks(8)
            .map(|part| part.iter().sum::<f64>() / part.len() as f64);
        let means: Vec<f64> = means.collect();
        let mean = means.iter().sum::<f64>() / means.len().max(1) as f64;
        if means.len() < 2 || mean <= 0.0 {
            // One stretch says nothing about others.
            return 0.0;
        }
        let squares = means.iter().map(|one| (one - mean).powi(2)).sum::<f64>();
        (squares / (means.len() - 1) as f64).sqrt() / mean
    }

    /// What it may have to put up with.
    pub(super) fn worst(&self) -> f64 {
        // The fewer samples, the more likely is something slower than all of them.
        let doubt = 0.3 / (self.samples.len().max(1) as f64).sqrt();
        self.percentile(0.05) * (1.0 - doubt)
    }

    fn percentile(&self, share: f64) -> f64 {
        let mut sorted: Vec<f64> = self.samples.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let index = (share * sorted.len() as f64) as usize;
        sorted.get(index).copied().unwrap_or(Self::ASSUMED).max(1.0)
    }
}

/// How fast the guest newly dirties pages just now. A page that is dirty already does not count again.
#[derive(Clone, Debug, Default)]
pub(super) struct DirtyRate {
    steps: VecDeque<(f64, f64)>,
    elapsed: f64,
    dirtied: f64,
}

impl DirtyRate {
    /// Long enough for several slices of the throttle, short enough to notice a change.
    const WINDOW: f64 = 0.06;
    const MAX_STEPS: usize = 256;

    pub(super) fn add(&mut self, step: &ObservedStep) {
        self.steps.push_back((step.elapsed, step.dirtied));
        self.elapsed += step.elapsed;
        self.dirtied += step.dirtied;
        while let Some(&(elapsed, dirtied)) = self.steps.front() {
            let enough = self.elapsed - elapsed >= Self::WINDOW && self.steps.len() > 1;
            if !enough && self.steps.len() <= Self::MAX_STEPS {
                break;
            }
            self.steps.pop_front();
            self.elapsed -= elapsed;
            self.dirtied -= dirtied;
        }
    }

    /// Page bytes per second.
    pub(super) fn rate(&self) -> f64 {
        if self.elapsed <= 1e-6 {
            return 0.0;
        }
        (self.dirtied / self.elapsed).max(0.0)
    }
}
