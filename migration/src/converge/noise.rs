//! How far the host keeps this process from its CPUs: what widens the intervals of predictions.

use std::collections::VecDeque;
use std::time::Duration;

/// How much later than it had asked for the engine was woken, observation by observation.
#[derive(Clone, Debug, Default)]
pub(super) struct Lateness {
    /// Seconds since the observation before, and how much of that was too much.
    samples: VecDeque<(f64, f64)>,
}

impl Lateness {
    /// About two seconds of observations: stalls come in bursts, and those of a minute ago say little.
    const WINDOW: usize = 192;
    /// With fewer observations than this the host is taken to be quiet.
    const FEWEST: usize = 20;

    pub(super) fn add(&mut self, elapsed: f64, late: Duration) {
        if elapsed <= 0.0 {
            return;
        }
        if self.samples.len() == Self::WINDOW {
            self.samples.pop_front();
        }
        self.samples.push_back((elapsed, late.as_secs_f64().min(elapsed)));
    }

    /// What is not exceeded, in this share of all cases, by the time that is lost in so many seconds: the sums over all
    /// stretches of that length that were seen.
    pub(super) fn lost_in(&self, seconds: f64, share: f64) -> f64 {
        // Of a few observations one in ten is the worst of them, which says nothing.
        if self.samples.len() < Self::FEWEST {
            return 0.0;
        }
        let mut sums: Vec<f64> = Vec::with_capacity(self.samples.len());
        let (mut first, mut elapsed, mut late) = (0, 0.0, 0.0);
        for sample in &self.samples {
            elapsed += sample.0;
            late += sample.1;
            while let Some(oldest) = self.samples.get(first)
                && elapsed - oldest.0 >= seconds
                && oldest.0 < elapsed
            {
                elapsed -= oldest.0;
                late -= oldest.1;
                first += 1;
            }
            sums.push(late.max(0.0));
        }
        sums.sort_by(f64::total_cmp);
        let index = (share * sums.len() as f64) as usize;
        let found = sums.get(index).or(sums.last()).copied().unwrap_or(0.0);
        // What was seen is longer than what is asked about, or shorter.
        if elapsed > seconds {
            found
        } else {
            found * (seconds / elapsed.max(1e-3)).min(10.0)
        }
    }

    /// The part of the time that is lost.
    pub(super) fn share(&self) -> f64 {
        let (elapsed, late) = self
            .samples
            .iter()
            .fold((0.0, 0.0), |sum, sample| (sum.0 + sample.0, sum.1 + sample.1));
        if elapsed > 0.0 { late / elapsed } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(late_ms: impl IntoIterator<Item = u64>) -> Lateness {
        let mut lateness = Lateness::default();
        for late in late_ms {
            lateness.add(0.01 + late as f64 / 1e3, Duration::from_millis(late));
        }
        lateness
    }

    #[test]
    fn a_quiet_host_loses_nothing() {
        let quiet = seen([0; 100]);
        assert_eq!((quiet.lost_in(0.02, 0.9), quiet.share()), (0.0, 0.0));
        assert_eq!(Lateness::default().lost_in(1.0, 0.9), 0.0);
    }

    #[test]
    fn the_longer_the_stretch_the_more_is_lost() {
        // Every tenth observation is 5 ms late: one in ten of the short stretches has one, every second has some.
        let busy = seen((0..190).map(|n| if n % 10 == 0 { 5 } else { 0 }));
        assert!((busy.share() - 0.5 / 10.5).abs() < 0.01, "{}", busy.share());
        assert_eq!(busy.lost_in(0.001, 0.8), 0.0);
        assert!((busy.lost_in(0.001, 0.95) - 0.005).abs() < 1e-9);
        assert!((busy.lost_in(0.15, 0.5) - 0.005).abs() < 1e-9);
        assert!(busy.lost_in(1.0, 0.5) > 0.04);
        assert!(busy.lost_in(10.0, 0.5) > busy.lost_in(1.0, 0.5));
    }
}
