//! How soon a guest from a snapshot runs.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use tests::{PATIENCE, TestHost};

use crate::bench::{Bench, print_status};
use crate::godwit::Godwit;
use crate::guest::{BenchGuest, next_tick};
use crate::row::Figure;
use crate::sentinel::Window;
use crate::stats::median;
use crate::strace::Traces;

const RUNS: u32 = 11;
/// By how much the larger guest may take longer, KVM's slots aside.
const GROWTH: f64 = 1.2;

/// Restores a small and a large guest in turns.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let host = TestHost::with(bench.fixtures.clone())?;
    let sizes = [128, 8192];
    for mib in sizes {
        let guest = BenchGuest {
            fill: false,
            ..BenchGuest::idle(mib)
        };
        let mut godwit = Godwit::start(&bench.fixtures, guest, &[])?;
        godwit.journey.vm.snapshot(&directory(&host, mib), &[])?;
        godwit.journey.vm.wait_success(PATIENCE)?;
    }
    let [mut small, mut large, mut slots] = [const { Vec::new() }; 3];
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        for (mib, times) in sizes.into_iter().zip([&mut small, &mut large]) {
            let what = format!("restore of {mib} MiB {run}/{runs}");
            let ms = bench.clean(&what, |_| restore(&host, &directory(&host, mib)))?;
            print_status(format_args!("{what}: {ms:.2} ms"));
            times.push(ms);
        }
        let what = format!("slots of 8 GiB {run}/{runs}");
        let ms = bench.clean(&what, |_| time_of_slots(&host, &directory(&host, 8192)))?;
        print_status(format_args!("{what}: {ms:.2} ms"));
        slots.push(ms);
    }
    let [small, large, slots] = [small, large, slots].map(median);
    let allowed = small.zip(slots).map(|(small, slots)| GROWTH * small + slots);
    Ok(vec![
        Figure::alone("restore-128mib-ms", small),
        Figure::beside("restore-8gib-ms", large, allowed),
        Figure::alone("restore-8gib-slots-ms", slots),
    ])
}

fn directory(host: &TestHost, mib: u64) -> std::path::PathBuf {
    host.path(&format!("snapshot-{mib}"))
}

/// Milliseconds from the start of the process until it says that its vCPUs are in the guest.
fn restore(host: &TestHost, directory: &Path) -> Result<(f64, Window)> {
    let ((restored, ms), window) = Window::of(|| {
        let begin = Instant::now();
        let restored = host.restore(directory, &["--resume"]);
        (restored, begin.elapsed().as_secs_f64() * 1e3)
    });
    let mut vm = restored?;
    next_tick(vm.process.stdout())?;
    vm.godwit("stop", &["--force"])?.expect_code(0)?;
    vm.wait_success(PATIENCE)?;
    Ok((ms, window))
}

/// Milliseconds in the calls that make the machine's memory slots.
fn time_of_slots(host: &TestHost, directory: &Path) -> Result<(f64, Window)> {
    let (traced, window) = Window::of(|| {
        let traces = Traces::new()?;
        let mut vm = host.restore_under(&traces.tracer(), directory, &["--resume"])?;
        vm.godwit("stop", &["--force"])?.expect_code(0)?;
        vm.wait_success(PATIENCE)?;
        traces.calls()
    });
    Ok((traced?.iter().map(|call| call.ms).sum(), window))
}
