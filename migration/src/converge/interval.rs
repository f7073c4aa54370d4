//! Intervals that hold what was predicted, nine times in ten.

use std::time::Duration;

use super::duration;

/// From the least to the most that a predicted time is likely to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Interval {
    /// Less is unlikely.
    pub low: Duration,
    /// More is unlikely.
    pub high: Duration,
}

impl Interval {
    /// From seconds.
    pub(super) fn of(low: f64, high: f64) -> Self {
        let low = duration(low);
        Self {
            low,
            high: duration(high).max(low),
        }
    }

    /// Of a downtime that consists of these costs alone, as rehearsed once.
    pub(crate) fn of_costs(total: Duration) -> Self {
        let total = total.as_secs_f64();
        Self::of(least_cost(total), most_cost(total))
    }

    /// The same so much later.
    pub(crate) fn after(self, time: Duration) -> Self {
        Self {
            low: self.low.saturating_add(time),
            high: self.high.saturating_add(time),
        }
    }
}

/// What costs that were rehearsed, in seconds, may come down to.
pub(super) fn least_cost(rehearsed: f64) -> f64 {
    (rehearsed * 0.8 - 0.3e-3).max(0.0)
}

/// What they may come up to on a quiet host. Most of it is the wake-up of the vCPUs' threads at the destination, which may
/// find their CPU taken by what the move itself leaves to be done.
pub(super) fn most_cost(rehearsed: f64) -> f64 {
    rehearsed * 1.1 + 0.7e-3
}
