//! What it takes to pause a guest and to save its vCPUs, with one of them and with 32.

use anyhow::{Result, ensure};

use crate::bench::{Bench, print_status};
use crate::godwit::{Asked, Godwit};
use crate::guest::BenchGuest;
use crate::row::Figure;
use crate::stats::median;

const RUNS: u32 = 10;
const MANY: u32 = 32;

/// Moves two guests in turn. Before each pause the engine rehearses it several times: the means of those are compared, as
/// the pause itself comes but once.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let guest = |cpus| BenchGuest {
        cpus,
        fill: false,
        ..BenchGuest::idle(256)
    };
    let mut guests = [
        Godwit::start(&bench.fixtures, guest(1), &[])?,
        Godwit::start(&bench.fixtures, guest(MANY), &[])?,
    ];
    // One of 32 vCPUs that idle keeps two CPUs busy: each wakes up every millisecond.
    for godwit in &guests {
        godwit.freeze()?;
    }
    let mut found = [Vec::new(), Vec::new()];
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        for (godwit, found) in guests.iter_mut().zip(&mut found) {
            let what = format!("vcpus {run}/{runs}: {}", godwit.guest.cpus);
            godwit.thaw()?;
            let ended = bench.hop(&what, godwit, &Asked::default())?;
            godwit.freeze()?;
            ensure!(ended.moved, "the guest was not moved");
            let pauses = ended.report.rehearsal_pause_ms;
            let mean = pauses.sum / f64::from(pauses.count.max(1));
            print_status(format_args!("{what}: {mean:.3} ms for a pause and its state"));
            found.push(mean);
        }
    }
    let [one, many] = found;
    Ok(vec![Figure::beside(
        "pause-32-vcpus-ms",
        median(many),
        median(one),
    )])
}
