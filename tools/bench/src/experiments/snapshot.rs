//! How fast snapshots are written, beside dd.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use tests::{PATIENCE, TestProcess};

use crate::bench::{Bench, print_status};
use crate::godwit::Godwit;
use crate::guest::{BenchGuest, BenchRate};
use crate::row::Figure;
use crate::sentinel::Window;
use crate::stats::median;

const MEMORY_MIB: u64 = 256;
/// What has changed when a difference is written.
const CHANGED_MIB: u64 = 9;
const RUNS: u32 = 7;

/// What one snapshot came to.
struct WrittenSnapshot {
    bytes: f64,
    ms: f64,
    paused_ms: f64,
}

/// Writes whole snapshots and differences in turns with as many bytes by dd.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let guest = BenchGuest {
        workset_mib: CHANGED_MIB,
        ..BenchGuest::busy(MEMORY_MIB, BenchRate::BytesPerSecond(100_000_000))
    };
    let godwit = Godwit::start(&bench.fixtures, guest, &[])?;
    let directory = godwit.journey.host.path("");
    let [mut full, mut full_dd, mut diff, mut diff_dd, mut pauses] = [const { Vec::new() }; 5];
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        let what = |kind| format!("{kind} snapshot {run}/{runs}");
        let source = directory.join("whole/memory");
        let whole = bench.clean(&what("whole"), |_| write(&godwit, &directory.join("whole"), &[]))?;
        full.push(whole.bytes / whole.ms / 1e3);
        full_dd.push(bench.clean(&what("dd beside the whole"), |_| {
            dd(&source, &directory, whole.bytes)
        })?);
        // So that all of the working set has changed.
        guest.settle(godwit.process())?;
        let difference = bench.clean(&what("difference to the whole"), |_| {
            guest.settle(godwit.process())?;
            write(&godwit, &directory.join("difference"), &["--diff"])
        })?;
        diff.push(difference.bytes / difference.ms / 1e3);
        pauses.push(difference.paused_ms);
        diff_dd.push(bench.clean(&what("dd beside the difference"), |_| {
            dd(&source, &directory, difference.bytes)
        })?);
        print_status(format_args!(
            "{}: whole {:.0} MB/s, dd {:.0} MB/s; difference of {:.1} MB in {:.1} ms (paused {:.2}), {:.0} MB/s, dd {:.0} MB/s",
            what("whole and difference,"),
            full[full.len() - 1],
            full_dd[full_dd.len() - 1],
            difference.bytes / 1e6,
            difference.ms,
            difference.paused_ms,
            diff[diff.len() - 1],
            diff_dd[diff_dd.len() - 1],
        ));
        for name in ["whole", "difference"] {
            std::fs::remove_dir_all(directory.join(name))?;
        }
    }
    Ok(vec![
        Figure::beside("snapshot-full-vs-dd", median(full), median(full_dd)),
        Figure::beside("snapshot-diff-vs-dd", median(diff), median(diff_dd)),
        Figure::alone("snapshot-diff-pause-ms", median(pauses)),
    ])
}

/// Writes a snapshot, in place of one that a stall spoiled.
fn write(godwit: &Godwit, directory: &Path, options: &[&str]) -> Result<(WrittenSnapshot, Window)> {
    if directory.exists() {
        std::fs::remove_dir_all(directory)?;
    }
    let options = [&["--keep-running"], options].concat();
    let (report, window) = Window::of(|| godwit.journey.vm.snapshot(directory, &options));
    let report = report?;
    let number = |key: &str| {
        report[key]
            .as_f64()
            .with_context(|| format!("no {key} in {report}"))
    };
    let written = WrittenSnapshot {
        bytes: number("stored_bytes")?,
        ms: number("total_ms")?,
        paused_ms: number("paused_ms")?,
    };
    Ok((written, window))
}

/// MB/s of dd with so many bytes of a file that is in the page cache, to a new one beside it.
fn dd(source: &Path, directory: &Path, bytes: f64) -> Result<(f64, Window)> {
    let target = directory.join("dd");
    let mut command = Command::new("dd");
    command.args(["bs=2M", "conv=fsync", "iflag=count_bytes", "status=none"]);
    command.arg(format!("count={bytes}"));
    let (mut input, mut output) = (std::ffi::OsString::from("if="), std::ffi::OsString::from("of="));
    input.push(source);
    output.push(&target);
    command.args([input, output]);
    let begin = Instant::now();
    let (finished, window) = Window::of(|| TestProcess::run(command, PATIENCE));
    let seconds = begin.elapsed().as_secs_f64();
    finished?.expect_code(0)?;
    std::fs::remove_file(target)?;
    Ok((bytes / seconds / 1e6, window))
}
