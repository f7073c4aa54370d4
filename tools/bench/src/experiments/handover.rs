//! Memory handed over to a process of the same host.

use anyhow::{Context, Result, ensure};
use migration::DataPath;

use crate::bench::{Bench, print_status};
use crate::godwit::{Asked, Godwit};
use crate::guest::BenchGuest;
use crate::row::Figure;
use crate::stats::median;
use crate::warm::{RESERVE_MIB, available_mib};

const RUNS: u32 = 5;

/// Three sizes, one after the other: together they would not fit into a small machine.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let small = downtime(bench, 1 << 10)?;
    let middle = downtime(bench, 4 << 10)?;
    let large = downtime(bench, 16 << 10);
    let large = large
        .inspect_err(|error| print_status(format_args!("handover of 16 GiB: {error:#}")))
        .ok();
    Ok(vec![
        Figure::alone("handover-downtime-ms", Some(middle)),
        Figure::beside("handover-downtime-16gib-ms", large, Some(small)),
    ])
}

fn downtime(bench: &mut Bench, memory_mib: u64) -> Result<f64> {
    let available = available_mib()?;
    ensure!(
        available >= memory_mib + RESERVE_MIB,
        "expected {memory_mib} MiB and {RESERVE_MIB} more to be available, got {available} MiB"
    );
    let mut godwit = Godwit::start(
        &bench.fixtures,
        BenchGuest::idle(memory_mib),
        &["--shared-memory"],
    )?;
    let asked = Asked {
        migrate: &["--max-downtime", "30ms"],
        reserve: false,
        handover: true,
        promise: false,
    };
    let mut downtimes = Vec::new();
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        let ended = bench.hop(
            &format!("handover of {memory_mib} MiB {run}/{runs}"),
            &mut godwit,
            &asked,
        )?;
        let path = ended.report.data_path;
        ensure!(
            path == DataPath::Handover,
            "expected a handover of memory, got {path:?}"
        );
        downtimes.push(ended.report.downtime_ms.context("not moved")?);
    }
    median(downtimes).context("no runs")
}
