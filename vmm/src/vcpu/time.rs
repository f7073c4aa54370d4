//! What vCPU threads get of the host's CPUs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use migration::VcpuTime;

/// The schedulers' counts of the vCPU threads that have asked to be counted.
#[derive(Default)]
pub(super) struct VcpuTimes {
    threads: Mutex<Vec<File>>,
}

impl VcpuTimes {
    /// Counts the calling thread from here on. Not where the kernel does not say what threads get (`CONFIG_SCHED_INFO`), or
    /// where there is no `/proc`.
    pub(super) fn count_this_thread(&self) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.extend(File::open("/proc/thread-self/schedstat"));
    }

    /// What each has got so far, in the same order each time; nothing for a thread that has ended.
    pub(super) fn read(&self) -> Vec<VcpuTime> {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads
            .iter()
            .map(|thread| read(thread).unwrap_or_default())
            .collect()
    }
}

/// Nanoseconds on a CPU, nanoseconds on a run queue, and how often it got a CPU
/// (Documentation/scheduler/sched-stats.rst).
fn read(schedstat: &File) -> Option<VcpuTime> {
    let mut text = [0; 96];
    let len = schedstat.read_at(&mut text, 0).ok()?;
    let mut numbers = std::str::from_utf8(text.get(..len)?)
        .ok()?
        .split_ascii_whitespace();
    let mut next = || numbers.next()?.parse().ok().map(Duration::from_nanos);
    Some(VcpuTime {
        ran: next()?,
        waited: next()?,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_thread_that_works_has_run_and_one_that_has_ended_has_nothing() {
        let times = Arc::new(VcpuTimes::default());
        let ((worked, has_worked), (end, ending)) = (channel::<()>(), channel::<()>());
        let thread = std::thread::spawn({
            let times = times.clone();
            move || {
                times.count_this_thread();
                let began = Instant::now();
                while began.elapsed() < Duration::from_millis(20) {
                    std::hint::spin_loop();
                }
                worked.send(()).unwrap();
                let _ = ending.recv();
            }
        });
        has_worked.recv().unwrap();
        let found = times.read();
        assert_eq!(found.len(), 1);
        assert!(found[0].ran > Duration::ZERO, "{found:?}");
        drop(end);
        thread.join().unwrap();
        // The kernel forgets a thread some time after it has ended.
        let patience = Instant::now() + Duration::from_secs(10);
        while times.read() != [VcpuTime::default()] {
            assert!(Instant::now() < patience, "{:?}", times.read());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
