//! How long a guest stands still for a snapshot that is copied while it runs on.

use anyhow::{Context, Result};

use crate::bench::{Bench, print_status};
use crate::godwit::Godwit;
use crate::guest::{BenchGuest, BenchRate, next_tick, reset_gap};
use crate::row::Figure;
use crate::sentinel::Window;
use crate::stats::median;

const RUNS: u32 = 5;

/// Milliseconds of one snapshot.
struct LiveSnapshot {
    /// How long the guest stood still, by the report.
    paused_ms: f64,
    /// The longest time in which the guest did nothing, by its own clock: copies that it waits for included.
    gap_ms: f64,
}

/// Saves a small and a large guest that write.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let [small, large] = [2048, 8192].map(|mib| measure(bench, mib));
    let (small, large) = (small?, large?);
    let paused = |found: &[LiveSnapshot]| median(found.iter().map(|one| one.paused_ms));
    Ok(vec![
        Figure::alone("live-snapshot-pause-ms", paused(&small)),
        Figure::beside("live-snapshot-pause-8gib-ms", paused(&large), paused(&small)),
        Figure::alone("live-snapshot-gap-ms", median(small.iter().map(|one| one.gap_ms))),
    ])
}

fn measure(bench: &mut Bench, memory_mib: u64) -> Result<Vec<LiveSnapshot>> {
    let guest = BenchGuest::busy(memory_mib, BenchRate::BytesPerSecond(300_000_000));
    let mut godwit = Godwit::start(&bench.fixtures, guest, &[])?;
    let directory = godwit.journey.host.path("live");
    let runs = bench.count(RUNS);
    let mut found = Vec::new();
    for run in 1..=runs {
        let what = format!("live snapshot of {memory_mib} MiB {run}/{runs}");
        // It has gone through its working set since the one before: all of that is mapped.
        guest.settle(godwit.process())?;
        reset_gap(&mut godwit.journey.vm.process)?;
        let snapshot = bench.clean(&what, |_| {
            let (report, window) = Window::of(|| {
                godwit
                    .journey
                    .vm
                    .snapshot(&directory, &["--keep-running", "--live"])
            });
            let report = report?;
            std::fs::remove_dir_all(&directory)?;
            let paused_ms = report["paused_ms"].as_f64().context("no paused_ms")?;
            let gap_ms = next_tick(godwit.process().stdout())?.max_gap_us as f64 / 1e3;
            Ok((LiveSnapshot { paused_ms, gap_ms }, window))
        })?;
        print_status(format_args!(
            "{what}: paused for {:.2} ms, the guest's longest gap {:.2} ms",
            snapshot.paused_ms, snapshot.gap_ms
        ));
        found.push(snapshot);
    }
    Ok(found)
}
