//! What the start of dirty logging costs: the time in KVM's calls that turn it on, as the kernel's tracer sees
//! them from outside.

use std::process::Command;

use ::tests::{PATIENCE, Process};
use anyhow::{Context, Result, ensure};

use crate::bench::{Bench, say};
use crate::godwit::{Asked, Godwit};
use crate::guest::Guest;
use crate::row::Figure;
use crate::stats::median;

const MEMORY_MIB: u64 = 2048;
const RUNS: u32 = 5;

/// Moves an idle guest under strace.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let mut godwit = Godwit::start(&bench.fixtures, Guest::idle(MEMORY_MIB), &[])?;
    let mut times = Vec::new();
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        let what = format!("start of the dirty log {run}/{runs}");
        let ms = bench.clean(&what, |_| {
            // One file for each thread: in a common one, calls of different threads cut each other in two.
            let directory = tempfile::tempdir()?;
            let mut command = Command::new("strace");
            command.args([
                "-ff",
                "-T",
                "-e",
                "trace=ioctl",
                "-p",
                &godwit.process().id().to_string(),
            ]);
            command.arg("-o").arg(directory.path().join("thread"));
            let mut strace = Process::spawn(command)?;
            let attached = |line: &str| line.contains(" attached").then_some(());
            strace.stderr().wait("strace", 0, PATIENCE, attached)?;
            let ended = godwit.hop(&Asked::default())?;
            ensure!(ended.moved, "an idle guest was not moved: {}", ended.summary());
            strace.wait(PATIENCE)?;
            let files = std::fs::read_dir(directory.path())?;
            let traces = files.map(|file| Ok(std::fs::read_to_string(file?.path())?));
            let traces = traces.collect::<Result<String>>().context("strace's output")?;
            let ms = spent_ms(&traces).context("no call that turns dirty logging on")?;
            say(format_args!("{what}: {ms:.3} ms"));
            Ok((ms, ended.window))
        })?;
        times.push(ms);
    }
    Ok(vec![Figure::alone("dirty-log-start-ms", median(times))])
}

/// Time in all calls that set a memory region with dirty logging; nothing if there is none.
fn spent_ms(trace: &str) -> Option<f64> {
    let calls = trace
        .lines()
        .filter(|line| line.contains("KVM_MEM_LOG_DIRTY_PAGES"));
    let times = calls.filter_map(|line| {
        let (_, time) = line.trim_end().strip_suffix('>')?.rsplit_once('<')?;
        time.parse::<f64>().ok()
    });
    times.map(|seconds| seconds * 1e3).reduce(|a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_the_calls_add_up() {
        let region = "ioctl(7, KVM_SET_USER_MEMORY_REGION, {slot=0, flags=KVM_MEM_LOG_DIRTY_PAGES, guest_phys_addr=0})";
        let trace = format!(
            "11 ioctl(9, KVM_RUN, 0) = 0 <0.5>\n12 {region} = 0 <0.000250>\n12 {region} = 0 <0.001>\n"
        );
        assert_eq!(spent_ms(&trace), Some(1.25));
        assert_eq!(spent_ms("ioctl(7, KVM_RUN, 0) = 0 <0.5>"), None);
    }
}
