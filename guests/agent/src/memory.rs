//! The memory workload: stamped pages, overwritten in sweeps, each checked before it is overwritten.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel};
use std::thread;
use std::time::{Duration, Instant};

use guest_core::{DirtyPace, PAGE, STAMP_WORDS, WORDS, WorkloadRate, body_intact, check, fill_body, stamp};

use crate::physical::Physical;
use crate::report::AgentReport;

/// How long the workload waits when nothing is due.
const NAP: Duration = Duration::from_millis(5);
/// A batch of pages that takes so long is followed by a rest that is as long: where each page is slow, say as the host
/// copies it, the workload leaves half of the CPU to the rest of the guest, and misses its rate.
const SLOW: Duration = Duration::from_millis(1);
/// Most of that rest: the guest may have stood still in the middle of a batch.
const LONGEST_REST: Duration = Duration::from_millis(200);
/// Nanoseconds of the monotonic clock in a millisecond: the pace's clock.
const KHZ: u64 = 1_000_000;

/// Asks the workload to verify everything; the answer is the number of pages.
pub(crate) type Verify = SyncSender<u64>;

/// Starts the workload on `bytes` of memory, at physical address `base` if one is given. The first [`Verify`] is
/// answered when all of it is filled.
pub(crate) fn start(
    bytes: u64,
    base: Option<u64>,
    rate: WorkloadRate,
    report: Arc<AgentReport>,
) -> Sender<Verify> {
    let (sender, requests) = channel();
    thread::spawn(move || {
        let pages = match base {
            None => Pages::anonymous(bytes / PAGE),
            Some(base) => Pages::physical(base, bytes / PAGE).unwrap_or_else(|error| {
                report.error(format_args!("memory={base:#x} expected=mapped got={error}"));
                Pages::anonymous(0)
            }),
        };
        run(pages, rate, &report, &requests);
    });
    sender
}

fn run(mut pages: Pages, rate: WorkloadRate, report: &AgentReport, requests: &Receiver<Verify>) {
    let start = Instant::now();
    let nanoseconds = || start.elapsed().as_nanos() as u64;
    let mut pace = DirtyPace::new(rate, 1, KHZ, nanoseconds());
    loop {
        let due = if pages.count == 0 {
            0
        } else {
            pace.due(nanoseconds())
        };
        let begin = Instant::now();
        for _ in 0..due {
            pages.dirty_next(report);
        }
        report.pages.fetch_add(due, Ordering::Relaxed);
        let nap = if due == 0 {
            NAP
        } else {
            rest_after(rate, begin.elapsed())
        };
        match requests.recv_timeout(nap) {
            // The thread that asked may have gone meanwhile.
            Ok(answer) => drop(answer.send(pages.verify(report))),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// How long the workload rests after a batch that took so long.
fn rest_after(rate: WorkloadRate, took: Duration) -> Duration {
    if rate == WorkloadRate::Max || took < SLOW {
        Duration::ZERO
    } else {
        took.min(LONGEST_REST)
    }
}

struct Pages {
    memory: Box<dyn AsMut<[u64]>>,
    /// The word where the first whole page of the memory begins.
    first: usize,
    count: u64,
    position: u64,
    generation: u64,
}

impl Pages {
    /// Memory as every program gets it, page by page.
    fn anonymous(count: u64) -> Self {
        let words = vec![0; (count as usize + 1) * WORDS];
        let first = words.as_ptr().align_offset(PAGE as usize);
        Self::filled(Box::new(words), first, count)
    }

    /// Physical memory that the kernel leaves alone.
    fn physical(base: u64, count: u64) -> io::Result<Self> {
        let memory = Physical::map(base, (count * PAGE) as usize)?;
        Ok(Self::filled(Box::new(memory), 0, count))
    }

    fn filled(memory: Box<dyn AsMut<[u64]>>, first: usize, count: u64) -> Self {
        let mut pages = Self {
            memory,
            first,
            count,
            position: 0,
            generation: 0,
        };
        for number in 0..count {
            let (head, body) = pages.split(number);
            head.copy_from_slice(&stamp(number, 0));
            fill_body(number, body);
        }
        pages
    }

    fn split(&mut self, number: u64) -> (&mut [u64], &mut [u64]) {
        let at = self.first + number as usize * WORDS;
        let words = (*self.memory).as_mut();
        words[at..at + WORDS].split_at_mut(STAMP_WORDS)
    }

    fn check(&mut self, number: u64, generation: u64, report: &AgentReport) -> bool {
        let (head, _) = self.split(number);
        let Some(head) = head.first_chunk::<STAMP_WORDS>() else {
            return false;
        };
        let Err(seen) = check(head, number, generation) else {
            return true;
        };
        let (page, got, intact) = (seen.page, seen.generation, u8::from(seen.intact));
        report.error(format_args!(
            "page={number} expected={generation} got={got} got_page={page} intact={intact}"
        ));
        false
    }

    fn dirty_next(&mut self, report: &AgentReport) {
        let (number, generation) = (self.position, self.generation);
        self.check(number, generation, report);
        self.split(number)
            .0
            .copy_from_slice(&stamp(number, generation + 1));
        self.position += 1;
        if self.position == self.count {
            self.position = 0;
            self.generation += 1;
        }
    }

    fn verify(&mut self, report: &AgentReport) -> u64 {
        for number in 0..self.count {
            let generation = self.generation + u64::from(number < self.position);
            if self.check(number, generation, report) && !body_intact(number, self.split(number).1) {
                report.error(format_args!("page={number} expected=body got=other"));
            }
        }
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweeps_keep_every_stamp() {
        let report = AgentReport::default();
        let mut pages = Pages::anonymous(10);
        for _ in 0..25 {
            pages.dirty_next(&report);
        }
        assert_eq!((pages.generation, pages.position), (2, 5));
        assert_eq!(pages.verify(&report), 10);
        assert_eq!(report.errors(), 0);
    }

    #[test]
    fn who_is_slow_leaves_half_of_the_time_to_others() {
        let rate = WorkloadRate::BytesPerSecond(1 << 20);
        assert_eq!(rest_after(rate, SLOW / 2), Duration::ZERO);
        assert_eq!(rest_after(rate, SLOW * 20), SLOW * 20);
        assert_eq!(rest_after(rate, SLOW * 10_000), LONGEST_REST);
        assert_eq!(rest_after(WorkloadRate::Max, SLOW * 20), Duration::ZERO);
    }

    #[test]
    fn a_stale_page_and_a_lost_body_are_detected() {
        let report = AgentReport::default();
        let mut pages = Pages::anonymous(10);
        for _ in 0..13 {
            pages.dirty_next(&report);
        }
        pages.split(7).0.copy_from_slice(&stamp(7, 0));
        pages.split(2).1[100] = 0;
        pages.verify(&report);
        assert_eq!(report.errors(), 2);
        for _ in 0..10 {
            pages.dirty_next(&report);
        }
        assert_eq!(report.errors(), 3);
    }
}
