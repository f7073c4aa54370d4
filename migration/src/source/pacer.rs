//! A cap on the bandwidth of all streams together: says when the next bytes may be sent, and does not wait itself.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Says when the next bytes may be sent.
#[derive(Debug)]
pub(super) struct Pacer {
    schedule: Mutex<Schedule>,
}

#[derive(Clone, Copy, Debug)]
struct Schedule {
    bytes_per_s: Option<u64>,
    /// When everything that was booked so far has been sent at this rate.
    due: Instant,
}

/// Time in which no stream sent is lost, except this much of it, which makes up for a thread that wakes up late.
const SLACK: Duration = Duration::from_millis(5);
/// The time that one batch may take, so that the cap holds over short times as well.
const BATCH_TIME: Duration = Duration::from_millis(1);

impl Pacer {
    pub(super) fn new(bytes_per_s: Option<u64>, now: Instant) -> Self {
        let schedule = Schedule {
            bytes_per_s,
            due: now,
        };
        Self {
            schedule: Mutex::new(schedule),
        }
    }

    /// Changes the cap; what was booked before no longer counts.
    pub(super) fn set(&self, bytes_per_s: Option<u64>, now: Instant) {
        *self.lock() = Schedule {
            bytes_per_s,
            due: now,
        };
    }

    /// Books bytes. Returns how long to wait before they may be sent.
    pub(super) fn book(&self, bytes: u64, now: Instant) -> Duration {
        let mut schedule = self.lock();
        let Some(rate) = schedule.bytes_per_s else {
            return Duration::ZERO;
        };
        let from = schedule.due.max(now.checked_sub(SLACK).unwrap_or(now));
        schedule.due = from + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        from.saturating_duration_since(now)
    }

    /// The most bytes for one batch: at a slow rate small batches make a steady flow instead of bursts.
    pub(super) fn batch_bytes(&self, most: u64) -> u64 {
        self.lock().bytes_per_s.map_or(most, |rate| {
            ((rate as f64 * BATCH_TIME.as_secs_f64()) as u64).min(most)
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Schedule> {
        // Two values, whole at any time.
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cap_holds_for_steady_and_for_late_senders() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let pacer = Pacer::new(Some(1_000_000), start);
        assert_eq!(pacer.book(10_000, start), Duration::ZERO);
        assert_eq!(pacer.book(10_000, start), Duration::from_millis(10));
        // A little late: made up for.
        assert_eq!(pacer.book(10_000, at(23)), Duration::ZERO);
        assert_eq!(pacer.book(10_000, at(24)), Duration::from_millis(6));
        // Long idle: the time is lost but for the slack.
        assert_eq!(pacer.book(10_000, at(1000)), Duration::ZERO);
        assert_eq!(pacer.book(10_000, at(1000)), Duration::from_millis(5));
        pacer.set(None, at(1000));
        assert_eq!(pacer.book(u64::MAX, at(1000)), Duration::ZERO);
        assert_eq!(pacer.batch_bytes(1 << 20), 1 << 20);
        pacer.set(Some(1_000_000), at(1000));
        assert_eq!(pacer.batch_bytes(1 << 20), 1000);
    }
}
