//! How many pages are due: a rate without bursts.

use crate::memory::PAGE;
use crate::settings::WorkloadRate;

/// One worker's pace, on a clock of so many ticks.
#[derive(Clone, Copy, Debug)]
pub struct DirtyPace {
    pages_per_second: Option<u64>,
    ticks_per_second: u64,
    since: u64,
    done: u64,
}

impl DirtyPace {
    /// Most pages between two readings of the clock.
    pub const BATCH: u64 = 16;

    /// A fair part of `rate` for one of `workers`, from clock value `now` on, at `khz` ticks a millisecond.
    pub fn new(rate: WorkloadRate, workers: u32, khz: u64, now: u64) -> Self {
        let pages_per_second = match rate {
            WorkloadRate::Max => None,
            WorkloadRate::BytesPerSecond(bytes) => Some(bytes / PAGE / u64::from(workers.max(1))),
        };
        Self {
            pages_per_second,
            ticks_per_second: (khz * 1000).max(1),
            since: now,
            done: 0,
        }
    }

    /// Pages to dirty now; the caller does so. What fell due during a stop of more than 100 ms is dropped:
    /// a guest that was held back goes on at its rate.
    pub fn due(&mut self, now: u64) -> u64 {
        let Some(rate) = self.pages_per_second else {
            return Self::BATCH;
        };
        let elapsed = now.saturating_sub(self.since);
        let seconds = elapsed / self.ticks_per_second;
        let rest = elapsed % self.ticks_per_second;
        let owed =
            seconds * rate + (u128::from(rest) * u128::from(rate) / u128::from(self.ticks_per_second)) as u64;
        let due = owed.saturating_sub(self.done);
        if due > rate / 10 + Self::BATCH {
            self.since = now;
            self.done = 0;
            return 0;
        }
        let batch = due.min(Self::BATCH);
        self.done += batch;
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(pace: &mut DirtyPace, from: u64, to: u64) -> u64 {
        (from..to).step_by(100).map(|now| pace.due(now)).sum()
    }

    #[test]
    fn the_rate_is_kept_and_shared() {
        // 1 MHz TSC, read every 100 µs; 40.96 MB/s over two CPUs are 5000 pages/s each.
        let mut pace = DirtyPace::new(WorkloadRate::BytesPerSecond(40_960_000), 2, 1000, 5_000_000);
        let pages = run(&mut pace, 5_000_000, 8_000_000);
        assert!((14_990..=15_000).contains(&pages), "{pages}");
    }

    #[test]
    fn no_burst_after_a_stop() {
        let mut pace = DirtyPace::new(WorkloadRate::BytesPerSecond(40_960_000), 1, 1000, 0);
        run(&mut pace, 0, 1_000_000);
        let pages = run(&mut pace, 3_000_000, 3_010_000);
        assert!(pages <= 100, "{pages}");
    }

    #[test]
    fn the_ends_of_the_scale() {
        assert_eq!(
            DirtyPace::new(WorkloadRate::Max, 4, 1000, 0).due(0),
            DirtyPace::BATCH
        );
        assert_eq!(
            DirtyPace::new(WorkloadRate::BytesPerSecond(0), 4, 1000, 0).due(50_000),
            0
        );
    }
}
