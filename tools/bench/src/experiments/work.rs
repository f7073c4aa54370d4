//! What a migration costs the guest that works as fast as it can.

use anyhow::{Context, Result, ensure};
use tests::{PATIENCE, Tick};

use crate::bench::{Bench, print_status};
use crate::godwit::{Asked, Godwit};
use crate::guest::{BenchGuest, BenchRate, pages_per_s};
use crate::row::Figure;
use crate::stats::median;

const GUEST: BenchGuest = BenchGuest {
    fill: true,
    memory_mib: 2048,
    workset_mib: 512,
    rate: BenchRate::Max,
    tick_ms: 20,
    reads: 0,
};
const RUNS: u32 = 5;

/// Moves the guest and compares its pages per second before, during and after.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let mut godwit = Godwit::start(&bench.fixtures, GUEST, &[])?;
    let asked = Asked {
        migrate: &["--max-downtime", "100ms", "--on-miss", "switch"],
        reserve: true,
        ..Default::default()
    };
    let (mut during, mut after) = (Vec::new(), Vec::new());
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        let what = format!("work {run}/{runs}");
        GUEST.settle(godwit.process())?;
        let usual = second(&godwit)?;
        let ended = bench.hop(&what, &mut godwit, &asked)?;
        ensure!(ended.moved, "the guest was not moved");
        let ticks = ended
            .ticks
            .get(ended.ticks_before..)
            .context("fewer ticks than before")?;
        let slowed = ticks
            .first()
            .zip(ticks.last())
            .and_then(|(first, last)| pages_per_s(first, last));
        let slowed = slowed.context("the migration was too short for two ticks")?;
        GUEST.settle(godwit.process())?;
        let later = second(&godwit)?;
        print_status(format_args!(
            "{what}: {usual:.0}, {slowed:.0}, {later:.0} pages/s before, during, after"
        ));
        during.push(slowed / usual);
        after.push(later / usual);
    }
    Ok(vec![Figure::beside(
        "work-before-during-after",
        median(during),
        median(after),
    )])
}

/// Pages per second over a second from now on.
fn second(godwit: &Godwit) -> Result<f64> {
    let output = godwit.process().stdout();
    let first = output.wait("a tick", output.mark(), PATIENCE, Tick::parse)?;
    let later = |line: &str| Tick::parse(line).filter(|tick| tick.us >= first.us + 1_000_000);
    let last = output.wait("a second of ticks", output.mark(), PATIENCE, later)?;
    pages_per_s(&first, &last).context("the guest's clock stands still")
}
