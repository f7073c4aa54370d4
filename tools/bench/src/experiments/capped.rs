//! A guest that dirties five times what the link may carry, beside QEMU with auto-converge.

use std::time::Duration;

use anyhow::Result;

use crate::bench::{Bench, print_status};
use crate::godwit::{Asked, Godwit};
use crate::guest::{BenchGuest, BenchRate};
use crate::qemu::{QemuJourney, QemuSettings};
use crate::row::Figure;
use crate::stats::median;

const MEMORY_MIB: u64 = 1024;
const RUNS: u32 = 5;

/// Moves both guests in turn. QEMU lifts its cap for the final copy; so does godwit by default.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let guest = BenchGuest::busy(MEMORY_MIB, BenchRate::BytesPerSecond(1_000_000_000));
    let mut godwit = Godwit::start(&bench.fixtures, guest, &[])?;
    godwit.freeze()?;
    let mut qemu = QemuJourney::start(&bench.fixtures, guest, &[])?;
    qemu.freeze()?;
    let asked = Asked {
        migrate: &["--bandwidth", "200MiB/s", "--max-downtime", "30ms"],
        reserve: true,
        ..Default::default()
    };
    let (limit, bandwidth) = (Duration::from_millis(30), Some(200 << 20));
    let settings = QemuSettings {
        limit,
        bandwidth,
        multifd: None,
        auto_converge: true,
        prealloc: true,
    };
    let (mut totals, mut peer_totals) = (vec![], vec![]);
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        godwit.thaw()?;
        let ended = bench.hop(&format!("capped {run}/{runs}: godwit"), &mut godwit, &asked)?;
        godwit.freeze()?;
        // A guest that was not moved took for ever.
        totals.push(if ended.moved {
            ended.report.total_ms / 1e3
        } else {
            f64::INFINITY
        });
        let what = format!("capped {run}/{runs}: QEMU");
        qemu.thaw()?;
        let moved = bench.clean(&what, |_| {
            let moved = qemu.hop(&settings)?;
            print_status(format_args!(
                "{what}: {:.0} ms, downtime {:.2} ms",
                moved.total_ms, moved.downtime_ms
            ));
            let window = moved.window;
            Ok((moved, window))
        })?;
        qemu.freeze()?;
        peer_totals.push(moved.total_ms / 1e3);
    }
    let total = median(totals).filter(|total| total.is_finite());
    Ok(vec![Figure::beside(
        "overload-total-vs-qemu",
        total,
        median(peer_totals),
    )])
}
