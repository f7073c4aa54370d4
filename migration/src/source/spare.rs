//! Leaves the host's CPUs to a guest that works: decides how many streams send while it runs.
//!
//! Knows neither threads nor connections.

use std::time::Duration;

use crate::ports::VcpuTime;

/// A vCPU that runs for at least this share of the time works; one that runs less and waits is only late.
const WORKS: f64 = 0.2;
/// And if it waits for a CPU for at least this share of the time, it is held up.
const HELD_UP: f64 = 0.1;
/// A stream rests when a vCPU was held up in so many looks in a row: once may be anything's fault.
const LOOKS: u32 = 2;
/// And goes on when none was for this long.
const CALM: Duration = Duration::from_millis(500);

/// How many streams send, as the vCPUs do.
#[derive(Debug)]
pub(super) struct SpareStreams {
    streams: usize,
    sending: usize,
    last: Option<(Duration, Vec<VcpuTime>)>,
    /// Looks in a row that found a vCPU held up.
    held_up: u32,
    /// Since when none was found held up, and no stream went on.
    calm_since: Duration,
}

impl SpareStreams {
    /// All of so many streams send at first.
    pub(super) fn new(streams: usize) -> Self {
        Self {
            streams,
            sending: streams,
            last: None,
            held_up: 0,
            calm_since: Duration::ZERO,
        }
    }

    /// Takes what vCPUs have got of the host's CPUs up to a time, in the same order each time. Returns how many streams send
    /// from here on: one less when a vCPU that works is held up, but always one, and one more when none was for a while.
    pub(super) fn observe(&mut self, at: Duration, times: Vec<VcpuTime>) -> usize {
        let Some((then, before)) = self.last.replace((at, times)) else {
            self.calm_since = at;
            return self.sending;
        };
        let now = self.last.iter().flat_map(|(_, times)| times);
        let elapsed = at.saturating_sub(then).as_secs_f64().max(1e-9);
        let share = |now: Duration, before: Duration| now.saturating_sub(before).as_secs_f64() / elapsed;
        let is_held_up = |(now, before): (&VcpuTime, &VcpuTime)| {
            share(now.ran, before.ran) >= WORKS && share(now.waited, before.waited) >= HELD_UP
        };
        if now.zip(&before).any(is_held_up) {
            self.calm_since = at;
            self.held_up += 1;
            if self.held_up >= LOOKS {
                self.held_up = 0;
                self.sending = self.sending.saturating_sub(1).max(1);
            }
        } else {
            self.held_up = 0;
            if at.saturating_sub(self.calm_since) >= CALM {
                self.calm_since = at;
                self.sending = self.streams.min(self.sending + 1);
            }
        }
        self.sending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of looks every 10 ms at vCPUs that get so many milliseconds between two and wait for so many.
    fn sending(streams: usize, looks: &[&[(u64, u64)]]) -> Vec<usize> {
        let mut spare = SpareStreams::new(streams);
        let mut times = vec![VcpuTime::default(); looks[0].len()];
        let mut at = Duration::ZERO;
        assert_eq!(spare.observe(at, times.clone()), streams);
        let look = |vcpus: &&[(u64, u64)]| {
            at += Duration::from_millis(10);
            for (time, (ran, waited)) in times.iter_mut().zip(*vcpus) {
                time.ran += Duration::from_millis(*ran);
                time.waited += Duration::from_millis(*waited);
            }
            spare.observe(at, times.clone())
        };
        looks.iter().map(look).collect()
    }

    #[test]
    fn a_vcpu_that_works_and_waits_gets_the_cpu_of_a_stream_at_a_time() {
        assert_eq!(
            sending(
                3,
                &[&[(6, 4)], &[(8, 2)], &[(9, 1)], &[(5, 5)], &[(5, 5)], &[(5, 5)]]
            ),
            [3, 2, 2, 1, 1, 1]
        );
        assert_eq!(
            sending(2, &[&[(10, 0), (5, 5)], &[(9, 1), (10, 0)]]),
            [2, 1],
            "whichever it is"
        );
    }

    #[test]
    fn a_stream_rests_no_longer_than_it_must() {
        let mut looks: Vec<&[(u64, u64)]> = vec![&[(5, 5)]; 4];
        looks.extend([&[(10, 0)][..]; 110]);
        let found = sending(3, &looks);
        assert_eq!((found[3], found[52], found[53], found[103]), (1, 1, 2, 3));
    }

    #[test]
    fn a_vcpu_that_hardly_runs_or_is_late_once_takes_nothing() {
        assert_eq!(sending(2, &[&[(10, 0)], &[(1, 9)], &[(0, 0)]]), [2, 2, 2]);
        assert_eq!(sending(2, &[&[(5, 5)], &[(9, 0)], &[(5, 5)]]), [2, 2, 2]);
        assert_eq!(sending(2, &[&[], &[]]), [2, 2]);
    }
}
