//! Stalls of the host below: moments at which it did not let this machine's CPUs run.

#![allow(unsafe_code, reason = "asks for a real-time scheduling class")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_setaffinity};

/// How often each CPU's thread reads the clock.
const STEP: Duration = Duration::from_millis(1);
/// A gap that counts as a stall.
const STALL: Duration = Duration::from_millis(2);
/// Looks after which the time spent in the run queue is read anew, so that what adds up in harmless
/// microseconds is never taken for the cause of a gap.
const REFRESH: u32 = 32;

/// One stall of one CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stall {
    /// The CPU.
    pub(crate) cpu: usize,
    /// When the thread should have run.
    pub(crate) began: Instant,
    /// How long the CPU was away.
    pub(crate) lasted: Duration,
}

/// The time during which something was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// Its first moment.
    pub(crate) from: Instant,
    /// Its last moment.
    pub(crate) to: Instant,
}

/// One thread for each CPU, above all other load, that sleeps a millisecond at a time and notes when it comes back late.
pub(crate) struct Sentinel {
    shared: Arc<SentinelShared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct SentinelShared {
    stop: AtomicBool,
    stalls: Mutex<Vec<Stall>>,
}

impl Sentinel {
    /// Starts watching. Needs the right to use a real-time scheduling class.
    pub(crate) fn start() -> Result<Self> {
        let mut sentinel = Self {
            shared: Arc::default(),
            threads: Vec::new(),
        };
        for cpu in 0..std::thread::available_parallelism()?.get() {
            let shared = sentinel.shared.clone();
            let (ready, started) = std::sync::mpsc::channel();
            sentinel.threads.push(std::thread::spawn(move || {
                let prepared = CpuWatch::prepare(cpu);
                let watch = match prepared {
                    Ok(watch) => {
                        // The receiver is gone: the sentinel is being dropped.
                        let _ = ready.send(Ok(()));
                        watch
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                        return;
                    }
                };
                watch.run(&shared);
            }));
            started.recv().context("sentinel thread")??;
        }
        Ok(sentinel)
    }

    /// The stalls that touch a window.
    pub(crate) fn within(&self, window: Window) -> Vec<Stall> {
        let stalls = self.shared.stalls.lock().unwrap_or_else(PoisonError::into_inner);
        stalls
            .iter()
            .copied()
            .filter(|stall| stall.touches(window))
            .collect()
    }

    /// How many there were so far.
    pub(crate) fn count(&self) -> usize {
        self.shared
            .stalls
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It cannot panic, and if it did there is nothing left to do.
            let _ = thread.join();
        }
    }
}

impl Stall {
    fn touches(&self, window: Window) -> bool {
        self.began < window.to && self.began + self.lasted > window.from
    }
}

impl Window {
    /// Runs something; also returns from when to when it ran.
    pub(crate) fn of<T>(run: impl FnOnce() -> T) -> (T, Self) {
        let from = Instant::now();
        let value = run();
        (
            value,
            Self {
                from,
                to: Instant::now(),
            },
        )
    }
}

/// One CPU's thread.
struct CpuWatch {
    cpu: usize,
    schedstat: File,
}

impl CpuWatch {
    fn prepare(cpu: usize) -> Result<Self> {
        let mut set = CpuSet::new();
        set.set(cpu);
        sched_setaffinity(None, &set).with_context(|| format!("cannot run on CPU {cpu}"))?;
        let parameters = libc::sched_param { sched_priority: 50 };
        // SAFETY: the call reads the parameters, which outlive it, and changes this thread only.
        let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
        if result != 0 {
            return Err(std::io::Error::last_os_error()).context("the sentinel needs SCHED_FIFO (root)");
        }
        let schedstat = File::open("/proc/thread-self/schedstat").context("/proc/thread-self/schedstat")?;
        Ok(Self { cpu, schedstat })
    }

    /// A late return has two causes: the thread was awake and waited for the CPU, which the kernel counts as
    /// time in the run queue (a stretch of kernel code that cannot be preempted: our own load), or nothing ran
    /// on this CPU at all, the timer's interrupt included. Only the latter is the host's.
    fn run(&self, shared: &SentinelShared) {
        let (mut queued, mut age) = (self.queued(), 0);
        while !shared.stop.load(Ordering::Relaxed) {
            let due = Instant::now() + STEP;
            std::thread::sleep(STEP);
            let late = Instant::now().saturating_duration_since(due);
            age += 1;
            if late <= STALL && age < REFRESH {
                continue;
            }
            let now_queued = self.queued();
            let lasted = late.saturating_sub(now_queued.saturating_sub(queued));
            (queued, age) = (now_queued, 0);
            if lasted > STALL {
                let stall = Stall {
                    cpu: self.cpu,
                    began: due,
                    lasted,
                };
                shared
                    .stalls
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(stall);
            }
        }
    }

    /// Time that this thread has waited in the run queue since it started.
    fn queued(&self) -> Duration {
        let mut text = [0; 96];
        let len = self.schedstat.read_at(&mut text, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(&text[..len]);
        let nanos = text
            .split_ascii_whitespace()
            .nth(1)
            .and_then(|word| word.parse().ok());
        Duration::from_nanos(nanos.unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stalls_count_where_they_touch() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let stall = Stall {
            cpu: 0,
            began: at(10),
            lasted: Duration::from_millis(5),
        };
        for (from, to, touches) in [
            (0, 10, false),
            (0, 11, true),
            (12, 13, true),
            (14, 20, true),
            (15, 20, false),
        ] {
            assert_eq!(
                stall.touches(Window {
                    from: at(from),
                    to: at(to)
                }),
                touches,
                "{from}..{to}"
            );
        }
    }

    #[test]
    fn our_own_load_is_no_stall() {
        // A machine whose tests may not use SCHED_FIFO has nothing to show here.
        let Ok(sentinel) = Sentinel::start() else { return };
        let stop = AtomicBool::new(false);
        let mut spun = 0u64;
        let stolen_before = stolen();
        let ((), window) = Window::of(|| {
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        while !stop.load(Ordering::Relaxed) {
                            std::hint::spin_loop();
                        }
                    });
                }
                let end = Instant::now() + Duration::from_millis(200);
                while Instant::now() < end {
                    spun += 1;
                }
                stop.store(true, Ordering::Relaxed);
            });
        });
        assert!(spun > 0);
        // Four spinning threads on two CPUs make an ordinary thread wait for milliseconds all the time. What the
        // sentinel counts is what the kernel says was stolen, which that counts in steps of 10 ms for each CPU.
        let lost: Duration = sentinel.within(window).iter().map(|stall| stall.lasted).sum();
        let stolen = stolen() - stolen_before;
        assert!(
            lost < stolen + Duration::from_millis(40),
            "{lost:?}, stolen {stolen:?}"
        );
    }

    /// Time that the host took from all CPUs since the start (proc(5), `stat`).
    fn stolen() -> Duration {
        let stat = std::fs::read_to_string("/proc/stat").unwrap();
        let ticks: u64 = stat.split_whitespace().nth(8).unwrap().parse().unwrap();
        Duration::from_millis(ticks * 10)
    }
}
