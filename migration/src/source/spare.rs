//! Leaves the host's CPUs to a guest that works: decides how many streams send while it runs.
//!
//! Knows neither threads nor connections.

use std::time::Duration;

use crate::ports::VcpuTime;

/// A vCPU that runs or waits for a CPU for at least this share of the time works. One that wants less gets most of it from
/// the host's scheduler, whoever else runs.
const WORKS: f64 = 0.8;
/// One that works and waits for a CPU for at least this share of the time is held up.
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

/// The part of the time between two looks in which a vCPU ran, and in which it waited for a CPU.
#[derive(Clone, Copy, Debug)]
struct Shares {
    ran: f64,
    waited: f64,
}

impl SpareStreams {
    /// All of so many streams may send, until the first look at the vCPUs.
    pub(super) fn new(streams: usize) -> Self {
        Self {
            streams,
            sending: streams,
            last: None,
            held_up: 0,
            calm_since: Duration::ZERO,
        }
    }

    /// Takes what vCPUs have got so far, before round 1 is sent. Returns how many streams are to begin: as many as find a
    /// CPU of their own, of so many, beside the vCPUs that have worked since the look before; but always one.
    pub(super) fn begin(&mut self, at: Duration, times: Vec<VcpuTime>, cpus: usize) -> usize {
        let working = self.since_last(at, times).into_iter();
        let working = working.filter(Shares::works).count();
        self.sending = self.streams.min(cpus.saturating_sub(working)).max(1);
        self.calm_since = at;
        self.sending
    }

    /// Takes what vCPUs have got of the host's CPUs up to a time, in the same order each time. Returns how many streams send
    /// from here on: one less when a vCPU that works is held up, but always one, and one more when none was for a while.
    pub(super) fn observe(&mut self, at: Duration, times: Vec<VcpuTime>) -> usize {
        let shares = self.since_last(at, times);
        if shares.iter().any(Shares::is_held_up) {
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

    /// What each vCPU has got since the look before; nothing at the first one.
    fn since_last(&mut self, at: Duration, times: Vec<VcpuTime>) -> Vec<Shares> {
        let Some((then, before)) = self.last.replace((at, times)) else {
            self.calm_since = at;
            return Vec::new();
        };
        let now = self.last.iter().flat_map(|(_, times)| times);
        let elapsed = at.saturating_sub(then).as_secs_f64().max(1e-9);
        let share = |now: Duration, before: Duration| now.saturating_sub(before).as_secs_f64() / elapsed;
        let shares = |(now, before): (&VcpuTime, &VcpuTime)| Shares {
            ran: share(now.ran, before.ran),
            waited: share(now.waited, before.waited),
        };
        now.zip(&before).map(shares).collect()
    }
}

impl Shares {
    fn works(&self) -> bool {
        self.ran + self.waited >= WORKS
    }

    fn is_held_up(&self) -> bool {
        self.works() && self.waited >= HELD_UP
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
    fn as_many_streams_begin_as_find_a_cpu_beside_vcpus_that_work() {
        // Two of the three vCPUs work: 16 and 20 ms of 20.
        let begin = |streams, cpus| {
            let of = |ran: [u64; 3]| {
                ran.map(|ran| VcpuTime {
                    ran: Duration::from_millis(ran),
                    waited: Duration::ZERO,
                })
            };
            let mut spare = SpareStreams::new(streams);
            assert_eq!(
                spare.observe(Duration::from_millis(5), of([9; 3]).into()),
                streams
            );
            spare.begin(Duration::from_millis(25), of([13, 25, 29]).into(), cpus)
        };
        assert_eq!((begin(4, 8), begin(4, 6), begin(4, 5)), (4, 4, 3));
        assert_eq!((begin(4, 3), begin(4, 2), begin(4, 1)), (1, 1, 1));
        let mut unseen = SpareStreams::new(2);
        assert_eq!(unseen.begin(Duration::ZERO, vec![VcpuTime::default(); 2], 2), 2);
    }

    #[test]
    fn a_vcpu_that_wants_little_or_is_late_once_takes_nothing() {
        assert_eq!(sending(2, &[&[(10, 0)], &[(1, 3)], &[(0, 4)]]), [2, 2, 2]);
        assert_eq!(sending(2, &[&[(5, 5)], &[(9, 0)], &[(5, 5)]]), [2, 2, 2]);
        assert_eq!(sending(2, &[&[], &[]]), [2, 2]);
    }
}
