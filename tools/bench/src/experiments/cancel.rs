//! Cancels at random moments, on a host that is idle and on one that is not: how long they take, and that nothing of the
//! migration stays behind.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use migration::Outcome;
use tests::{TestProcess, Tick, http};

use crate::bench::{Bench, print_status};
use crate::godwit::{Asked, Godwit, finished, report_of};
use crate::guest::{BenchGuest, BenchRate, gap_after_arrival, next_tick, pages_per_s};
use crate::row::Figure;
use crate::sentinel::Window;
use crate::stats::largest;
use crate::strace::{Strace, logged_slots};

const CANCELS: u32 = 100;
/// And with a busy loop on each CPU.
const BUSY_CANCELS: u32 = 50;
const GUEST: BenchGuest = BenchGuest {
    cpus: 1,
    fill: true,
    memory_mib: 512,
    workset_mib: 128,
    rate: BenchRate::Max,
    tick_ms: 5,
    reads: 0,
};
const ASKED: [&str; 6] = [
    "--bandwidth",
    "500MB/s",
    "--max-downtime",
    "20ms",
    "--deadline",
    "20s",
];
/// The share of its usual speed that a guest has again when neither throttle nor dirty log is left. With the log it
/// has a tenth, and the host below may halve what is usual from one second to the next.
const UNHINDERED: f64 = 0.3;
/// How long the guest gets to be there: it has to touch its working set once more.
const RECOVERY: Duration = Duration::from_secs(5);
/// Migrations under strace of which one must be cancelled in time.
const WATCHED: u32 = 10;
/// Ticks over which its speed is taken.
const TICKS: usize = 10;

/// How a cancel is requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asking {
    /// By `godwit cancel`.
    Command,
    /// Of the API: where the CPUs are busy a process that is new waits for them longer than all the rest takes.
    Request,
}

/// One migration that was cancelled.
struct CancelledMove {
    ms: f64,
    /// Until `godwit migrate` had ended.
    ended_ms: f64,
    window: Window,
}

/// Cancels the guest's migration again and again; where it moved before, it goes on from there.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let mut godwit = Godwit::start(&bench.fixtures, GUEST, &[])?;
    let (alone, whole) = cancel_often(bench, &mut godwit, "cancel", Asking::Command, CANCELS)?;
    log_is_off(&mut godwit, whole)?;
    let loops = BusyLoops::start()?;
    let (busy, _) = cancel_often(
        bench,
        &mut godwit,
        "cancel on a busy host",
        Asking::Request,
        BUSY_CANCELS,
    )?;
    drop(loops);
    Ok(vec![
        Figure::alone("cancel-ms-max", Some(alone)),
        Figure::alone("cancel-busy-ms-max", Some(busy)),
    ])
}

/// The longest of so many cancels in milliseconds, and how long a whole migration takes.
fn cancel_often(
    bench: &mut Bench,
    godwit: &mut Godwit,
    name: &str,
    asking: Asking,
    promised: u32,
) -> Result<(f64, Duration)> {
    GUEST.settle(godwit.process())?;
    // The best of three: whatever else runs can only slow it down.
    let speeds = (0..3)
        .map(|_| speed(godwit.process()))
        .collect::<Result<Vec<_>>>()?;
    let usual = largest(speeds).context("no speed")?;
    let ended = bench.hop(
        &format!("{name}: a whole migration"),
        godwit,
        &Asked {
            migrate: &ASKED,
            ..Default::default()
        },
    )?;
    let whole = Duration::from_secs_f64(ended.report.total_ms / 1e3);
    print_status(format_args!(
        "{name}: the guest dirties {usual:.0} pages/s; moments within {} ms",
        whole.as_millis()
    ));
    let (mut took, mut moved) = (Vec::new(), 0);
    let cancels = bench.count(promised);
    while took.len() < cancels as usize {
        let what = format!("{name} {}/{cancels}", took.len() + 1);
        ensure!(
            moved < 2 * cancels,
            "most migrations end before they are cancelled"
        );
        let cancelled = bench.clean(&what, |_| {
            GUEST.settle(godwit.process())?;
            loop {
                match cancel(godwit, asking, random(whole))? {
                    Some(cancelled) => {
                        recovered(godwit, usual)?;
                        let window = cancelled.window;
                        return Ok((cancelled, window));
                    }
                    None => moved += 1,
                }
            }
        })?;
        let CancelledMove { ms, ended_ms, .. } = cancelled;
        if took.iter().all(|before| *before < ms) {
            print_status(format_args!(
                "{what}: {ms:.1} ms, the longest so far; after {ended_ms:.1} ms of them the command ended"
            ));
        }
        took.push(ms);
    }
    print_status(format_args!(
        "{name}: {moved} migrations ended before the cancel came"
    ));
    Ok((largest(took).context("no cancel")?, whole))
}

/// A thread for each CPU that does nothing else but turn, until it is dropped.
struct BusyLoops {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl BusyLoops {
    fn start() -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let turn = |_| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        };
        let threads = (0..std::thread::available_parallelism()?.get())
            .map(turn)
            .collect();
        Ok(Self { stop, threads })
    }
}

impl Drop for BusyLoops {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // The thread cannot panic.
            let _ = thread.join();
        }
    }
}

/// Starts a migration and cancels it after `delay`. Nothing if the guest had moved by then.
fn cancel(godwit: &mut Godwit, asking: Asking, delay: Duration) -> Result<Option<CancelledMove>> {
    let (receiver, endpoint) = godwit.receiver(&Asked::default())?;
    let vm = &godwit.journey.vm;
    let migration = vm.start_migration(&endpoint, &ASKED)?;
    // A random moment is the point: nothing to wait for.
    std::thread::sleep(delay);
    let (command, socket) = (
        godwit.journey.host.command(["cancel", &vm.name]),
        godwit.journey.host.run_dir().join(format!("{}.sock", vm.name)),
    );
    let (ended, window) = Window::of(|| {
        let began = Instant::now();
        let command = match asking {
            Asking::Command => Some(TestProcess::spawn(command)?),
            Asking::Request => {
                // The guest may have moved just now, and its VM here have ended.
                let _ = http(&socket, "DELETE", "/migration", "");
                None
            }
        };
        let (report, moved) = report_of(finished(migration)?)?;
        let ended = began.elapsed();
        if !moved {
            next_tick(vm.process.stdout())?;
        }
        Ok::<_, anyhow::Error>((command, report, moved, ended, began.elapsed()))
    });
    let (command, report, moved, ended, took) = ended?;
    if moved {
        godwit.journey.arrive(receiver)?;
        gap_after_arrival(godwit.process())?;
        return Ok(None);
    }
    if let Some(command) = command {
        finished_cancel(command)?;
    }
    let (outcome, error) = (report.outcome, report.error);
    ensure!(
        outcome == Outcome::Cancelled,
        "expected it cancelled, got {outcome:?}: {error:?}"
    );
    Ok(Some(CancelledMove {
        ms: took.as_secs_f64() * 1e3,
        ended_ms: ended.as_secs_f64() * 1e3,
        window,
    }))
}

fn finished_cancel(command: TestProcess) -> Result<()> {
    let finished = command.finish(tests::PATIENCE)?;
    finished.expect_code(0).map(|_| ())
}

/// Shows that nothing holds the guest back any more.
fn recovered(godwit: &Godwit, usual: f64) -> Result<()> {
    let status = godwit.journey.vm.status()?;
    let throttle = status["migration"]["throttle_percent"].as_f64().unwrap_or(0.0);
    ensure!(throttle == 0.0, "still throttled after a cancel: {status}");
    let mut last = VecDeque::new();
    let fast = |line: &str| {
        last.push_back(Tick::parse(line)?);
        let speed = pages_per_s(last.front()?, last.back()?)?;
        if last.len() > TICKS {
            last.pop_front();
        }
        (speed >= UNHINDERED * usual).then_some(())
    };
    let output = godwit.process().stdout();
    output.wait(
        "the guest's usual speed after a cancel",
        output.mark(),
        RECOVERY,
        fast,
    )
}

/// Cancels once more, watched from outside, which takes too long to be measured: dirty logging was turned on and
/// is off again.
fn log_is_off(godwit: &mut Godwit, whole: Duration) -> Result<()> {
    for _ in 0..WATCHED {
        let strace = Strace::attach(godwit.process().id())?;
        let cancelled = cancel(godwit, Asking::Command, whole / 2)?;
        let calls = strace.finish()?;
        if cancelled.is_none() {
            continue;
        }
        ensure!(
            calls.iter().any(|call| call.logged),
            "no call turned dirty logging on: {calls:?}"
        );
        let logged = logged_slots(&calls);
        ensure!(
            logged.is_empty(),
            "dirty logging of slots {logged:?} is still on after a cancel"
        );
        return Ok(());
    }
    bail!("{WATCHED} migrations under strace ended before they were cancelled")
}

/// Pages per second over a second.
fn speed(process: &TestProcess) -> Result<f64> {
    let first = next_tick(process.stdout())?;
    let later = |line: &str| Tick::parse(line).filter(|tick| tick.us >= first.us + 1_000_000);
    let output = process.stdout();
    let last = output.wait("a second of ticks", output.mark(), tests::PATIENCE, later)?;
    pages_per_s(&first, &last).context("the guest's clock stands still")
}

/// Any duration up to `most`, all of them equally likely: the standard library seeds its hashers at random.
fn random(most: Duration) -> Duration {
    most.mul_f64(RandomState::new().hash_one(0u8) as f64 / u64::MAX as f64)
}
