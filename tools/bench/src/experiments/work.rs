//! What a migration costs the guest that works as fast as it can.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::{PATIENCE, TestProcess, Tick};

use crate::bench::{Bench, print_status};
use crate::godwit::{Asked, Godwit};
use crate::guest::{BenchGuest, BenchRate, pages_per_s};
use crate::qemu::{QemuJourney, QemuSettings};
use crate::row::Figure;
use crate::stats::median;

const GUEST: BenchGuest = BenchGuest {
    cpus: 1,
    fill: true,
    memory_mib: 2048,
    workset_mib: 512,
    rate: BenchRate::Max,
    tick_ms: 20,
    reads: 0,
};
const RUNS: u32 = 5;

/// Moves both guests in turn and compares their pages per second before, during and after.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let mut godwit = Godwit::start(&bench.fixtures, GUEST, &[])?;
    godwit.freeze()?;
    let mut qemu = QemuJourney::start(&bench.fixtures, GUEST, &[])?;
    qemu.freeze()?;
    let asked = Asked {
        migrate: &["--max-downtime", "100ms", "--on-miss", "switch"],
        reserve: true,
        ..Default::default()
    };
    let settings = QemuSettings {
        limit: Duration::from_millis(100),
        bandwidth: None,
        multifd: None,
        auto_converge: true,
        prealloc: true,
    };
    let (mut during, mut after, mut peer) = (Vec::new(), Vec::new(), Vec::new());
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        let what = format!("work {run}/{runs}: godwit");
        godwit.thaw()?;
        GUEST.settle(godwit.process())?;
        let usual = second(godwit.process())?;
        let ended = bench.hop(&what, &mut godwit, &asked)?;
        ensure!(ended.moved, "the guest was not moved");
        let slowed = speed(&ended.ticks, ended.ticks_before)?;
        GUEST.settle(godwit.process())?;
        let later = second(godwit.process())?;
        godwit.freeze()?;
        print_status(format_args!(
            "{what}: {usual:.0}, {slowed:.0}, {later:.0} pages/s before, during, after"
        ));
        during.push(slowed / usual);
        after.push(later / usual);
        let what = format!("work {run}/{runs}: QEMU");
        qemu.thaw()?;
        GUEST.settle(qemu.process())?;
        let usual = second(qemu.process())?;
        let moved = bench.clean(&what, |_| {
            let moved = qemu.hop(&settings)?;
            let window = moved.window;
            Ok((moved, window))
        })?;
        let slowed = speed(&moved.ticks, moved.ticks_before)?;
        qemu.freeze()?;
        print_status(format_args!(
            "{what}: moved in {:.0} ms, downtime {:.2} ms; {usual:.0}, {slowed:.0} pages/s before, during",
            moved.total_ms, moved.downtime_ms
        ));
        peer.push(slowed / usual);
    }
    Ok(vec![
        Figure::beside("work-during-vs-qemu", median(during.clone()), median(peer)),
        Figure::beside("work-before-during-after", median(during), median(after)),
    ])
}

/// Pages per second at the source from the first tick of a move to the last.
fn speed(ticks: &[Tick], before: usize) -> Result<f64> {
    let ticks = ticks.get(before..).context("fewer ticks than before")?;
    let ends = ticks.first().zip(ticks.last());
    ends.and_then(|(first, last)| pages_per_s(first, last))
        .context("the migration was too short for two ticks")
}

/// Pages per second over a second from now on.
fn second(process: &TestProcess) -> Result<f64> {
    let output = process.stdout();
    let first = output.wait("a tick", output.mark(), PATIENCE, Tick::parse)?;
    let later = |line: &str| Tick::parse(line).filter(|tick| tick.us >= first.us + 1_000_000);
    let last = output.wait("a second of ticks", output.mark(), PATIENCE, later)?;
    pages_per_s(&first, &last).context("the guest's clock stands still")
}
