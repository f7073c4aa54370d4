//! A downtime budget that is short of what a careless stop would cost.

use anyhow::Result;

use crate::bench::Bench;
use crate::godwit::{Asked, Godwit, MigrationEnd};
use crate::guest::{BenchGuest, BenchRate};
use crate::row::Figure;
use crate::stats::share;

const MEMORY_MIB: u64 = 1024;
const RUNS: u32 = 50;

/// Moves the guest again and again.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let guest = BenchGuest::busy(MEMORY_MIB, BenchRate::BytesPerSecond(300_000_000));
    let mut godwit = Godwit::start(&bench.fixtures, guest, &[])?;
    let asked = Asked {
        migrate: &["--max-downtime", "20ms"],
        promise: true,
        reserve: true,
        ..Default::default()
    };
    let runs = bench.count(RUNS);
    let ended = (1..=runs).map(|run| bench.hop(&format!("budget {run}/{runs}"), &mut godwit, &asked));
    let ended = ended.collect::<Result<Vec<MigrationEnd>>>()?;
    let kept = |ended: &MigrationEnd| ended.moved && ended.report.budget_kept;
    Ok(vec![Figure::alone("budget-20ms-kept", share(&ended, kept))])
}
