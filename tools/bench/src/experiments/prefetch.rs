//! How a guest fares whose snapshot lies on the disk and in no cache: with memory on demand, read before it runs, or read
//! while it runs.

use std::fs::File;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::{Advice, fadvise};
use tests::{PATIENCE, TestHost};

use crate::bench::{Bench, print_status};
use crate::godwit::Godwit;
use crate::guest::{BenchGuest, BenchRate, ticks};
use crate::row::Figure;
use crate::sentinel::Window;
use crate::stats::median;

/// It walks through its working set, so that nothing is slower for it than to wait for each next page.
const GUEST: BenchGuest = BenchGuest {
    cpus: 1,
    fill: true,
    memory_mib: 2048,
    workset_mib: 512,
    rate: BenchRate::Max,
    tick_ms: 10,
    reads: 0,
};
const RUNS: u32 = 7;
const SECOND: Duration = Duration::from_secs(1);

/// What one restore showed.
struct Restored {
    /// Pages that the guest wrote in the first second from the start of the process.
    first_second: f64,
    /// Milliseconds from there until all of its memory was there; not with memory on demand.
    all_here_ms: f64,
}

/// Restores one guest in each of the three ways in turn.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let host = TestHost::with(bench.fixtures.clone())?;
    let directory = host.path("snapshot");
    let before = save(bench, &directory)?;
    let ways = ["--lazy", "--prefetch", "--preload"];
    let mut found = ways.map(|_| Vec::new());
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        for (way, found) in ways.into_iter().zip(&mut found) {
            let what = format!("cold restore {way} {run}/{runs}");
            let restored = bench.clean(&what, |_| restore(&host, &directory, way, before))?;
            print_status(format_args!(
                "{what}: {:.0} pages written in the first second, all memory there after {:.0} ms",
                restored.first_second, restored.all_here_ms
            ));
            found.push(restored);
        }
    }
    let work = |found: &[Restored]| median(found.iter().map(|one| one.first_second));
    let all_here = |found: &[Restored]| median(found.iter().map(|one| one.all_here_ms));
    let [lazy, prefetch, preload] = &found;
    Ok(vec![
        Figure::beside("restore-prefetch-work", work(prefetch), work(lazy)),
        Figure::beside(
            "restore-prefetch-all-here-ms",
            all_here(prefetch),
            all_here(preload),
        ),
    ])
}

/// Puts a guest that has gone through its working set in files. Returns how many pages it had written at its last tick.
fn save(bench: &Bench, directory: &Path) -> Result<u64> {
    let mut godwit = Godwit::start(&bench.fixtures, GUEST, &[])?;
    GUEST.settle(godwit.process())?;
    godwit.journey.vm.snapshot(directory, &[])?;
    godwit.journey.vm.wait_success(PATIENCE)?;
    let last = ticks(godwit.process().stdout()).last().map(|tick| tick.pages);
    last.context("a guest without a tick")
}

fn restore(host: &TestHost, directory: &Path, way: &str, before: u64) -> Result<(Restored, Window)> {
    forget(&directory.join("memory"))?;
    let (restored, window) = Window::of(|| {
        let began = Instant::now();
        let vm = host.restore(directory, &["--resume", way])?;
        let running = began.elapsed();
        thread::sleep(SECOND.saturating_sub(running));
        let last = ticks(vm.process.stdout()).last().map(|tick| tick.pages);
        let first_second = last.unwrap_or(before).saturating_sub(before) as f64;
        let all_here = if way == "--prefetch" {
            vm.process
                .stderr()
                .wait("all of the memory", 0, PATIENCE, all_here_after)?
        } else {
            running.as_secs_f64() * 1e3
        };
        Ok::<_, anyhow::Error>((
            vm,
            Restored {
                first_second: if running < SECOND { first_second } else { 0.0 },
                all_here_ms: all_here,
            },
        ))
    });
    let (mut vm, restored) = restored?;
    vm.godwit("stop", &["--force"])?.expect_code(0)?;
    vm.wait_success(PATIENCE)?;
    Ok((restored, window))
}

/// The milliseconds in the line that says that all of the memory is there.
fn all_here_after(line: &str) -> Option<f64> {
    let (_, after) = line.split_once("all of the memory is here: ")?;
    let (_, ms) = after.split_once(" MiB after ")?;
    ms.strip_suffix(" ms")?.parse().ok()
}

/// Has the kernel drop what it has cached of a file.
fn forget(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    // Only what is on the disk can be dropped.
    file.sync_all()?;
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}
