//! When to stop copying and switch: pure arithmetic on what was measured.

use std::time::Duration;

use crate::options::OnMiss;

/// What the downtime costs besides copying memory. The engine replaces what it can measure before the pause
/// (the log, the flush) by the measurement; the rest stays as it is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedCosts {
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
}

impl Default for FixedCosts {
    fn default() -> Self {
        Self {
            pause: Duration::from_millis(1),
            drain: Duration::from_millis(1),
            final_log: Duration::from_millis(1),
            state: Duration::from_millis(2),
            restore: Duration::from_millis(5),
            resume: Duration::from_millis(1),
        }
    }
}

impl FixedCosts {
    /// All of them, with the round trips of the commit: the last pages' acknowledgement, "ready" after the
    /// state, and half of "go" and "resumed".
    pub(crate) fn total(&self, round_trip: Duration) -> Duration {
        let Self {
            pause,
            drain,
            final_log,
            state,
            restore,
            resume,
        } = *self;
        pause + drain + final_log + state + restore + resume + round_trip * 5 / 2
    }
}

/// How fast the connection is, as far as it was measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bandwidth {
    bytes_per_s: Option<f64>,
}

impl Bandwidth {
    /// A round with fewer bytes says more about latency than about bandwidth.
    const MIN_SAMPLE: u64 = 1 << 20;
    /// Until something was measured: a 1 Gbit/s network, so that the prediction errs on the safe side.
    const ASSUMED: f64 = 125e6;

    pub(crate) fn new() -> Self {
        Self { bytes_per_s: None }
    }

    /// Takes a round's bytes into account; recent rounds count most.
    pub(crate) fn sample(&mut self, bytes: u64, elapsed: Duration) {
        if bytes < Self::MIN_SAMPLE {
            return;
        }
        let sample = bytes as f64 / elapsed.as_secs_f64().max(1e-9);
        self.bytes_per_s = Some(self.bytes_per_s.map_or(sample, |before| (before + sample) / 2.0));
    }

    pub(crate) fn bytes_per_s(&self) -> f64 {
        self.bytes_per_s.unwrap_or(Self::ASSUMED)
    }

    /// How long so many bytes take.
    pub(crate) fn time_for(&self, bytes: u64) -> Duration {
        Duration::try_from_secs_f64(bytes as f64 / self.bytes_per_s()).unwrap_or(Duration::MAX)
    }
}

/// What to do after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Another round.
    Continue,
    /// Stop and copy.
    Switch,
    /// It will not fit, and the caller does not want it then.
    GiveUp,
}

/// Decides, round by round.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    budget: Duration,
    on_miss: OnMiss,
    max_rounds: u32,
    best: Option<Duration>,
    rounds_without_gain: u32,
}

impl Policy {
    /// Rounds without gain after which more of them are not worth it.
    const PATIENCE: u32 = 3;

    pub(crate) fn new(budget: Duration, on_miss: OnMiss, max_rounds: u32) -> Self {
        Self {
            budget,
            on_miss,
            max_rounds,
            best: None,
            rounds_without_gain: 0,
        }
    }

    /// Judges the downtime that a pause after `round` would bring.
    pub(crate) fn judge(&mut self, round: u32, predicted: Duration) -> Verdict {
        if predicted <= self.budget {
            return Verdict::Switch;
        }
        // A tenth less is a gain; anything smaller is noise.
        if self.best.is_none_or(|best| predicted < best.mul_f64(0.9)) {
            self.best = Some(predicted);
            self.rounds_without_gain = 0;
        } else {
            self.rounds_without_gain += 1;
        }
        match self.on_miss {
            _ if self.rounds_without_gain < Self::PATIENCE && round < self.max_rounds => Verdict::Continue,
            OnMiss::Switch => Verdict::Switch,
            OnMiss::Fail => Verdict::GiveUp,
        }
    }
}

/// How long the rest of a migration takes, if the guest goes on as it did: rounds that shrink by the ratio of
/// dirty rate and bandwidth, then the downtime. `None` if they do not shrink.
pub(crate) fn time_left(remaining: u64, dirty_rate: f64, bandwidth: &Bandwidth) -> Option<Duration> {
    let net = bandwidth.bytes_per_s() - dirty_rate;
    Duration::try_from_secs_f64(remaining as f64 / net).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn what_fits_switches_at_once() {
        let mut policy = Policy::new(ms(20), OnMiss::Fail, 30);
        assert_eq!(policy.judge(1, ms(20)), Verdict::Switch);
        assert_eq!(policy.judge(1, ms(21)), Verdict::Continue);
    }

    #[test]
    fn rounds_that_bring_nothing_end_as_the_caller_wants() {
        for (on_miss, end) in [(OnMiss::Fail, Verdict::GiveUp), (OnMiss::Switch, Verdict::Switch)] {
            let mut policy = Policy::new(ms(20), on_miss, 30);
            let verdicts: Vec<_> = [900, 500, 480, 490, 470]
                .iter()
                .zip(1..)
                .map(|(&t, n)| policy.judge(n, ms(t)))
                .collect();
            assert_eq!(verdicts[..4], [Verdict::Continue; 4]);
            assert_eq!(verdicts[4], end);
        }
    }

    #[test]
    fn rounds_that_bring_a_little_each_are_bounded() {
        let mut policy = Policy::new(ms(1), OnMiss::Fail, 10);
        let mut predicted = Duration::from_secs(1000);
        let rounds = (1..)
            .take_while(|&round| {
                predicted = predicted.mul_f64(0.8);
                policy.judge(round, predicted) == Verdict::Continue
            })
            .count();
        assert_eq!(rounds, 9);
    }

    #[test]
    fn bandwidth_comes_from_rounds_large_enough_to_tell() {
        let mut bandwidth = Bandwidth::new();
        bandwidth.sample(4096, ms(1000));
        assert_eq!(bandwidth.time_for(125_000_000), ms(1000));
        bandwidth.sample(1_000_000_000, ms(1000));
        assert_eq!(bandwidth.time_for(1_000_000_000), ms(1000));
        bandwidth.sample(3_000_000_000, ms(1000));
        assert_eq!(bandwidth.time_for(2_000_000_000), ms(1000));
        bandwidth.sample(u64::MAX, Duration::ZERO);
        assert!(bandwidth.time_for(u64::MAX) < ms(1000));
    }

    #[test]
    fn time_left_is_unknown_where_rounds_do_not_shrink() {
        let mut bandwidth = Bandwidth::new();
        bandwidth.sample(100 << 20, ms(1000));
        let rate = bandwidth.bytes_per_s();
        assert_eq!(time_left(100 << 20, 0.0, &bandwidth), Some(ms(1000)));
        assert_eq!(time_left(100 << 20, rate / 2.0, &bandwidth), Some(ms(2000)));
        assert_eq!(time_left(1, rate, &bandwidth), None);
        assert_eq!(time_left(1, rate * 2.0, &bandwidth), None);
    }

    #[test]
    fn the_terms_add_up() {
        let costs = FixedCosts {
            drain: ms(40),
            ..FixedCosts::default()
        };
        assert_eq!(costs.total(ms(2)), ms(1 + 40 + 1 + 2 + 5 + 1 + 5));
    }
}
