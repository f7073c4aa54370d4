//! Leaves the host's CPUs to a guest that works: decides how many streams send while it runs.
//!
//! Knows neither threads nor connections.

use std::time::Duration;

use crate::ports::VcpuTime;

/// A vCPU that runs for at least this share of the time works; one that runs less and waits is only late.
const WORKS: f64 = 0.2;
/// And if it waits for a CPU for at least this share of the time, it is held up.
const HELD_UP: f64 = 0.1;

/// How many streams send, as the vCPUs do.
#[derive(Debug)]
pub(super) struct SpareStreams {
    sending: usize,
    last: Option<(Duration, Vec<VcpuTime>)>,
}

impl SpareStreams {
    /// All of so many streams send at first.
    pub(super) fn new(streams: usize) -> Self {
        Self {
            sending: streams,
            last: None,
        }
    }

    /// Takes what vCPUs have got of the host's CPUs up to a time, in the same order each time. Returns how many streams send
    /// from here on: one less if a vCPU that works was held up since the time before, but always one.
    pub(super) fn observe(&mut self, at: Duration, times: Vec<VcpuTime>) -> usize {
        let Some((then, before)) = self.last.replace((at, times)) else {
            return self.sending;
        };
        let now = self.last.iter().flat_map(|(_, times)| times);
        let elapsed = at.saturating_sub(then).as_secs_f64().max(1e-9);
        let share = |now: Duration, before: Duration| now.saturating_sub(before).as_secs_f64() / elapsed;
        let is_held_up = |(now, before): (&VcpuTime, &VcpuTime)| {
            share(now.ran, before.ran) >= WORKS && share(now.waited, before.waited) >= HELD_UP
        };
        if now.zip(&before).any(is_held_up) {
            self.sending = self.sending.saturating_sub(1).max(1);
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
            sending(3, &[&[(6, 4)], &[(8, 2)], &[(9, 1)], &[(5, 5)]]),
            [2, 1, 1, 1]
        );
        assert_eq!(sending(2, &[&[(10, 0), (0, 0)], &[(10, 0), (5, 5)]]), [2, 1]);
    }

    #[test]
    fn a_vcpu_that_hardly_runs_or_never_waits_takes_nothing() {
        assert_eq!(sending(2, &[&[(10, 0)], &[(1, 9)], &[(0, 0)]]), [2, 2, 2]);
        assert_eq!(sending(2, &[&[], &[]]), [2, 2]);
    }

    #[test]
    fn a_vcpu_whose_thread_has_ended_is_no_vcpu_that_waits() {
        let mut spare = SpareStreams::new(2);
        let time = |ran, waited| VcpuTime {
            ran: Duration::from_millis(ran),
            waited: Duration::from_millis(waited),
        };
        spare.observe(Duration::ZERO, vec![time(5, 5), time(1, 0)]);
        assert_eq!(spare.observe(Duration::from_millis(10), vec![time(1, 0)]), 2);
    }
}
