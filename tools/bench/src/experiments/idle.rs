//! The downtime of a guest that does nothing, beside QEMU's with the same limit.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::bench::{Bench, print_status};
use crate::godwit::{Asked, Godwit};
use crate::guest::BenchGuest;
use crate::qemu::{QemuJourney, QemuSettings};
use crate::row::Figure;
use crate::stats::median;

const MEMORY_MIB: u64 = 2048;
const RUNS: u32 = 20;

/// Moves both guests in turn.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let guest = BenchGuest::idle(MEMORY_MIB);
    let mut godwit = Godwit::start(&bench.fixtures, guest, &[])?;
    godwit.freeze()?;
    let mut qemu = QemuJourney::start(&bench.fixtures, guest, &[])?;
    qemu.freeze()?;
    let asked = Asked {
        migrate: &["--max-downtime", "30ms"],
        reserve: true,
        ..Default::default()
    };
    let (limit, bandwidth, multifd) = (Duration::from_millis(30), None, None);
    let settings = QemuSettings {
        limit,
        bandwidth,
        multifd,
        auto_converge: false,
        prealloc: true,
    };
    let (mut downtimes, mut gaps, mut peer_downtimes, mut peer_gaps) = (vec![], vec![], vec![], vec![]);
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        let what = format!("idle {run}/{runs}: godwit");
        godwit.thaw()?;
        let ended = bench.hop(&what, &mut godwit, &asked)?;
        godwit.freeze()?;
        downtimes.push(ended.report.downtime_ms.context("an idle guest was not moved")?);
        gaps.extend(ended.gap_ms);
        let what = format!("idle {run}/{runs}: QEMU");
        qemu.thaw()?;
        let moved = bench.clean(&what, |_| {
            let moved = qemu.hop(&settings)?;
            print_status(format_args!(
                "{what}: {:.0} ms, downtime {:.2} ms (the guest saw {:.2})",
                moved.total_ms, moved.downtime_ms, moved.gap_ms
            ));
            let window = moved.window;
            Ok((moved, window))
        })?;
        qemu.freeze()?;
        peer_downtimes.push(moved.downtime_ms);
        peer_gaps.push(moved.gap_ms);
    }
    Ok(vec![
        Figure::beside("idle-downtime-ms", median(downtimes), median(peer_downtimes)),
        Figure::beside("idle-downtime-vs-qemu", median(gaps), median(peer_gaps)),
    ])
}
