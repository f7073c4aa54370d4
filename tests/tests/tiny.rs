//! A real Linux on the machine's own KVM, whatever kind that is.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tests::{Host, TinyGuest};

const MOVES: u32 = 2;

/// One boot for all of it: where kernel code is interpreted it takes most of half a minute.
#[test]
fn linux_boots_moves_under_load_and_powers_off() -> Result<()> {
    let guest = TinyGuest::default();
    let begin = Instant::now();
    let mut journey = guest.start(Host::new()?, &[])?;
    let boot = begin.elapsed().as_secs_f64();

    let mut dirtied = journey.vm.check_running()?.pages;
    let mut downtimes = Vec::new();
    for number in 1..=MOVES {
        let report = journey
            .hop_and_check_gap(&["--verify"])
            .with_context(|| format!("move {number} of {MOVES}"))?;
        ensure!(
            report.memory_digest.is_some(),
            "no digest with --verify: {report:?}"
        );
        ensure!(
            report.pages_sent >= guest.workset_mib << 8,
            "fewer pages than the workload has: {report:?}"
        );
        let pages = journey.vm.check_running()?.pages;
        ensure!(
            pages > dirtied,
            "the workload stands still: {dirtied} pages before the move, {pages} after it"
        );
        dirtied = pages;
        downtimes.push(report.downtime_ms.context("no downtime")?);
    }
    // Over a slow link: the kernel's own memory shrinks, and the workload's, which cannot, goes as it is.
    let report = journey.hop(&["--verify", "--compression", "zstd", "--bandwidth", "100MB/s"])?;
    println!(
        "compressed: {} bytes for {} pages",
        report.bytes_sent, report.pages_sent
    );
    ensure!(
        report.bytes_sent < report.pages_sent * 4096,
        "nothing was compressed: {report:?}"
    );
    journey.vm.check_running()?;
    let verified = journey.verify()?;
    ensure!(
        verified == guest.workset_mib << 8,
        "expected all pages to be verified, got {verified}"
    );
    journey.end()?;
    println!(
        "{} vCPUs up in {boot:.1} s, {dirtied} pages dirtied, downtimes {downtimes:.1?} ms",
        guest.cpus
    );
    Ok(())
}
