//! Damps log lines that a guest can provoke, so that it cannot flood the log.

use std::sync::atomic::{AtomicU64, Ordering};

/// Lets the 1st, 2nd, 4th, 8th… line through: at most 64 lines, whatever the guest does.
#[derive(Debug, Default)]
pub(crate) struct LogDamper(AtomicU64);

impl LogDamper {
    /// Counts one line; `Some(lines so far)` if this one is to be logged.
    pub(crate) fn count(&self) -> Option<u64> {
        let seen = self.0.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        seen.is_power_of_two().then_some(seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_leaves_few_lines() {
        let limited = LogDamper::default();
        assert_eq!((0..1_000_000).filter(|_| limited.count().is_some()).count(), 20);
    }
}
