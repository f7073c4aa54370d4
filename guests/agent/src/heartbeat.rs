//! The tick loop: its longest gap is the downtime as the guest sees it.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};

use crate::report::AgentReport;

/// Ticks for ever; prints at most one line in each `print`.
pub(crate) fn run(tick: Duration, print: Duration, report: &AgentReport) -> ! {
    let print_us = print.as_micros() as u64;
    let mut beats = Beats::default();
    let mut printed = None::<u64>;
    loop {
        let now = microseconds(clock_gettime(ClockId::Monotonic));
        if report.reset.swap(false, Ordering::Relaxed) {
            beats.longest = 0;
            report.line(format_args!("reset"));
        }
        if let Some(last) = beats.tick(now) {
            report.error(format_args!("clock=monotonic expected>={last} got={now}"));
        }
        if printed.is_none_or(|at| now.saturating_sub(at) >= print_us) {
            printed = Some(now);
            let real = microseconds(clock_gettime(ClockId::Realtime));
            let pages = report.pages.load(Ordering::Relaxed);
            let files = report.files.load(Ordering::Relaxed);
            let streamed = report.streamed.load(Ordering::Relaxed);
            let random = report.random.load(Ordering::Relaxed);
            report.line(format_args!(
                "tick n={} mono_us={now} real_us={real} max_gap_us={} pages={pages} errors={} files={files} streamed={streamed} random={random}",
                beats.count,
                beats.longest,
                report.errors()
            ));
        }
        thread::sleep(tick);
    }
}

/// Ticks seen; times in microseconds.
#[derive(Debug, Default)]
struct Beats {
    count: u64,
    last: Option<u64>,
    longest: u64,
}

impl Beats {
    /// Counts a tick. If the clock went backwards, returns where it was.
    fn tick(&mut self, now: u64) -> Option<u64> {
        self.count += 1;
        let last = self.last.replace(now)?;
        match now.checked_sub(last) {
            Some(gap) => {
                self.longest = self.longest.max(gap);
                None
            }
            None => Some(last),
        }
    }
}

fn microseconds(time: Timespec) -> u64 {
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_and_backward_steps() {
        let mut beats = Beats::default();
        assert_eq!(beats.tick(1000), None);
        assert_eq!(beats.tick(1050), None);
        assert_eq!(beats.tick(9000), None);
        assert_eq!(beats.tick(9050), None);
        assert_eq!((beats.count, beats.longest), (4, 7950));
        assert_eq!(beats.tick(9049), Some(9050));
        assert_eq!((beats.count, beats.longest), (5, 7950));
    }
}
