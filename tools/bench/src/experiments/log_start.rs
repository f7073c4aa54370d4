//! What the start of dirty logging costs: the time in KVM's calls that turn it on.

use anyhow::{Result, ensure};

use crate::bench::{Bench, print_status};
use crate::godwit::{Asked, Godwit};
use crate::guest::BenchGuest;
use crate::row::Figure;
use crate::stats::median;
use crate::strace::Strace;

const MEMORY_MIB: u64 = 2048;
const RUNS: u32 = 5;

/// Moves an idle guest under strace.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let mut godwit = Godwit::start(&bench.fixtures, BenchGuest::idle(MEMORY_MIB), &[])?;
    let mut times = Vec::new();
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        let what = format!("start of the dirty log {run}/{runs}");
        let ms = bench.clean(&what, |_| {
            let strace = Strace::attach(godwit.process().id())?;
            let ended = godwit.hop(&Asked::default())?;
            ensure!(ended.moved, "an idle guest was not moved: {}", ended.summary());
            let calls = strace.finish()?;
            let starts: Vec<f64> = calls
                .iter()
                .filter(|call| call.logged)
                .map(|call| call.ms)
                .collect();
            ensure!(!starts.is_empty(), "no call turned dirty logging on");
            let ms: f64 = starts.iter().sum();
            print_status(format_args!("{what}: {ms:.3} ms"));
            Ok((ms, ended.window))
        })?;
        times.push(ms);
    }
    Ok(vec![Figure::alone("dirty-log-start-ms", median(times))])
}
