//! The engine with a machine of 1 TiB of which little is populated: what it needs beside the guest's memory, how long a
//! look at its log takes, and how much longer its pause is than that of a small machine.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use migration::{Control, MigrateOptions, OnMiss, Outcome, ReceiveOptions, Receiver, Report, migrate};

use crate::bench::{Bench, print_status};
use crate::row::Figure;
use crate::sentinel::Window;
use crate::sparse::{SparseDestination, SparseMachine, SparseSource};
use crate::stats::{largest, median};

const GIB: u64 = 1 << 30;
const LARGE: u64 = 1024 * GIB;
const SMALL: u64 = 16 * GIB;
const POPULATED: u64 = 8 * GIB;
/// Both sides' populated memory, and what the bench and the host need besides.
const ROOM: u64 = 2 * POPULATED + 2 * GIB;
const RUNS: u32 = 3;
/// How often the process's memory is read.
const SAMPLING: Duration = Duration::from_millis(5);

/// What one move of a machine in this process was.
struct EngineMove {
    report: Report,
    /// The most memory of this process besides the guest's, less what it had before, in MiB.
    extra_mib: f64,
    window: Window,
}

/// Moves a large and a small machine in turn.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let free = available()?;
    ensure!(
        free >= ROOM,
        "expected {} GiB of available memory for a machine of {} GiB of which {} are populated, and for its copy, got {}",
        ROOM / GIB,
        LARGE / GIB,
        POPULATED / GIB,
        free / GIB
    );
    let (mut extra, mut looks, mut grown) = (Vec::new(), Vec::new(), Vec::new());
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        let mut pauses = Vec::new();
        for bytes in [SMALL, LARGE] {
            let what = format!("engine {run}/{runs}: {} GiB", bytes / GIB);
            let moved = bench.clean(&what, |_| {
                let moved = move_once(bytes)?;
                let window = moved.window;
                Ok((moved, window))
            })?;
            let Report {
                total_ms, downtime, ..
            } = &moved.report;
            let downtime_ms = moved.report.downtime_ms.context("moved without a downtime")?;
            print_status(format_args!(
                "{what}: moved in {total_ms:.0} ms, downtime {downtime_ms:.2} ms, last look {:.2} ms, {:.0} MiB besides the guest's",
                downtime.final_log_ms, moved.extra_mib
            ));
            pauses.push(downtime_ms);
            if bytes == LARGE {
                extra.push(moved.extra_mib);
                looks.push(downtime.final_log_ms);
            }
        }
        grown.extend(
            pauses
                .first()
                .zip(pauses.last())
                .map(|(small, large)| large - small),
        );
    }
    Ok(vec![
        Figure::alone("engine-1tib", largest(extra)),
        Figure::alone("engine-1tib-look-ms", median(looks)),
        Figure::alone("engine-1tib-pause-ms", median(grown)),
    ])
}

/// Moves a machine of so many bytes from one thread of this process to another.
fn move_once(bytes: u64) -> Result<EngineMove> {
    let machine = SparseMachine::new(bytes, POPULATED)?;
    let mut source = SparseSource::new(machine);
    let mut destination = SparseDestination::default();
    let endpoint = "tcp:127.0.0.1:0".parse()?;
    let mut receiver = Receiver::listen(&endpoint, ReceiveOptions::default())?;
    let to = receiver.endpoint().clone();
    let (receiving, sending) = (Control::new()?, Control::new()?);
    let options = MigrateOptions {
        max_downtime: Duration::from_millis(300),
        on_miss: OnMiss::Switch,
        ..MigrateOptions::default()
    };
    let before = own_memory()?;
    let (outcome, window) = Window::of(|| {
        thread::scope(|scope| {
            let received = scope.spawn(|| receiver.receive(&mut destination, &receiving));
            let migrated = scope.spawn(|| migrate(&mut source, &to, &options, &sending));
            let mut most = before;
            while !migrated.is_finished() {
                most = most.max(own_memory()?);
                thread::sleep(SAMPLING);
            }
            let migrated = migrated.join().map_err(|_| anyhow!("the source panicked"))?;
            if migrated.report.outcome != Outcome::Moved {
                // Whatever it waits for will not come.
                receiving.cancel();
            }
            let received = received.join().map_err(|_| anyhow!("the destination panicked"))?;
            let error = migrated.report.error.clone().unwrap_or_default();
            ensure!(migrated.report.outcome == Outcome::Moved, "not moved: {error}");
            received.context("not received")?;
            Ok((migrated.report, most))
        })
    });
    let (report, most) = outcome?;
    destination.check(&source)?;
    Ok(EngineMove {
        report,
        extra_mib: most.saturating_sub(before) as f64 / f64::from(1 << 20),
        window,
    })
}

/// Bytes of this process's own anonymous memory that are resident: the guests' memory is shared memory.
fn own_memory() -> Result<u64> {
    kib_of("/proc/self/status", "RssAnon:")
}

/// Bytes that this host can give away.
fn available() -> Result<u64> {
    kib_of("/proc/meminfo", "MemAvailable:")
}

fn kib_of(path: &str, name: &str) -> Result<u64> {
    let text = std::fs::read_to_string(path).context(path.to_owned())?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib << 10)
        .with_context(|| format!("{path} has no {name}"))
}
