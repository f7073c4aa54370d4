//! How much may pass in a time: a token bucket.

use std::time::Instant;

/// Fills up by so much a second, and holds so much at most.
#[derive(Debug)]
pub struct Allowance {
    burst: u64,
    per_second: u64,
    left: u64,
    /// When `left` was right.
    at: Instant,
}

impl Allowance {
    /// A full one.
    pub fn new(burst: u64, per_second: u64, now: Instant) -> Self {
        Self {
            burst,
            per_second,
            left: burst,
            at: now,
        }
    }

    /// Takes up to `wanted`; returns how much of it may pass.
    pub fn spend(&mut self, wanted: u64, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.at).as_micros();
        let more = u64::try_from(passed * u128::from(self.per_second) / 1_000_000).unwrap_or(u64::MAX);
        if more > 0 {
            // A part of a token would be lost by each look that comes before it is whole.
            self.left = self.left.saturating_add(more).min(self.burst);
            self.at = now;
        }
        let taken = wanted.min(self.left);
        self.left -= taken;
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_and_then_the_rate() {
        let start = Instant::now();
        let mut allowance = Allowance::new(10, 5, start);
        assert_eq!(allowance.spend(7, start), 7);
        assert_eq!(allowance.spend(7, start), 3);
        assert_eq!(allowance.spend(1, start), 0);
        // Looks in between take nothing away from the rate.
        let passed: u64 = (1..=2000)
            .map(|ms| allowance.spend(1, start + Duration::from_millis(ms)))
            .sum();
        assert_eq!(passed, 10);
        assert_eq!(allowance.spend(100, start + Duration::from_secs(3600)), 10);
    }
}
