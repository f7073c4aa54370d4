//! Snapshots of guests that run on at once.

use anyhow::{Result, ensure};
use tests::{BareGuest, Journey, PATIENCE, TestHost, TestProcess, wait_until};

const GUEST: BareGuest = BareGuest {
    memory_mib: 256,
    cpus: 2,
    workset: "128M",
    rate: "max",
    ..BareGuest::DEFAULT
};

#[test]
fn a_guest_that_writes_all_the_time_is_in_it_as_it_was() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &GUEST, &[])?;
    for (number, how) in ["--preload", "--prefetch", "--lazy"].into_iter().enumerate() {
        let directory = journey.host.path(&format!("live-{number}"));
        let report = journey.vm.snapshot(&directory, &["--keep-running", "--live"])?;
        let paused = report["paused_ms"].as_f64().unwrap_or(f64::MAX);
        let total = report["total_ms"].as_f64().unwrap_or(0.0);
        ensure!(paused < total / 2.0, "paused for {paused} ms of {total}");
        journey.vm.check_running()?;
        // Both go on, each from its own.
        let mut copy = journey.host.restore(&directory, &["--resume", how])?;
        copy.check_running()?;
        copy.godwit("stop", &["--force"])?.expect_code(0)?;
        copy.wait_success(PATIENCE)?;
    }
    journey.verify()?;
    journey.hop(&["--verify"])?;
    journey.verify()?;
    // What has arrived is memory of its own as well.
    let directory = journey.host.path("later");
    journey.vm.snapshot(&directory, &["--keep-running", "--live"])?;
    journey.verify()?;
    journey.end()
}

#[test]
fn what_cannot_be_live_is_refused_and_the_guest_runs_on() -> Result<()> {
    for (options, word) in [
        (&["--shared-memory"][..], "--shared-memory"),
        (&["--balloon"], "balloon"),
    ] {
        let journey = Journey::start(TestHost::new()?, &GUEST, options)?;
        let directory = journey.host.path("never").display().to_string();
        let refused = journey
            .vm
            .godwit("snapshot", &[&directory, "--keep-running", "--live"])?;
        refused.expect_code(1)?;
        ensure!(
            refused.stderr.contains(word),
            "expected {word:?}, got {refused:?}"
        );
        ensure!(!journey.host.path("never").exists());
        journey.vm.check_running()?;
        journey.end()?;
    }
    let host = TestHost::new()?;
    for more in [&["--live"][..], &["--live", "--keep-running", "--diff"]] {
        let words = [&["snapshot", "nobody", "never"], more].concat();
        TestProcess::run(host.command(words), PATIENCE)?.expect_code(2)?;
    }
    Ok(())
}

#[test]
fn a_difference_after_a_live_one_is_to_the_snapshot_before() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &GUEST, &[])?;
    let [base, live, difference, whole] =
        ["base", "live", "difference", "whole"].map(|name| journey.host.path(name));
    let id = journey.vm.snapshot(&base, &["--keep-running"])?["id"].clone();
    journey.vm.snapshot(&live, &["--keep-running", "--live"])?;
    journey.vm.check_running()?;
    let report = journey.vm.snapshot(&difference, &["--keep-running", "--diff"])?;
    ensure!(
        report["base"] == id,
        "expected a difference to {id}, got {report}"
    );
    let words = [&base, &difference, &whole].map(|path| path.display().to_string());
    let merge = ["snapshot", "merge", &words[0], &words[1], "--output", &words[2]];
    TestProcess::run(journey.host.command(merge), PATIENCE)?.expect_code(0)?;
    let mut copy = journey.host.restore(&whole, &["--resume", "--preload"])?;
    copy.check_running()?;
    copy.godwit("stop", &["--force"])?.expect_code(0)?;
    copy.wait_success(PATIENCE)?;
    journey.verify()?;
    journey.end()
}

#[test]
fn a_guest_from_a_snapshot_can_be_live_once_all_of_it_is_here() -> Result<()> {
    let large = BareGuest {
        memory_mib: 1024,
        ..GUEST
    };
    let mut journey = Journey::start(TestHost::new()?, &large, &[])?;
    let [saved, live] = ["saved", "live"].map(|name| journey.host.path(name));
    journey.vm.snapshot(&saved, &[])?;
    let restored = journey.host.restore(&saved, &["--prefetch", "--resume"])?;
    journey.arrive(restored)?;
    let early = live.display().to_string();
    let refused = journey
        .vm
        .godwit("snapshot", &[&early, "--keep-running", "--live"])?;
    refused.expect_code(1)?;
    ensure!(refused.stderr.contains("wait until"), "got {refused:?}");
    wait_until("all of the memory to be there", || {
        Ok(journey.vm.status()?["prefetch"].is_null())
    })?;
    journey.vm.snapshot(&live, &["--keep-running", "--live"])?;
    let mut copy = journey.host.restore(&live, &["--resume", "--preload"])?;
    copy.check_running()?;
    copy.godwit("stop", &["--force"])?.expect_code(0)?;
    copy.wait_success(PATIENCE)?;
    journey.verify()?;
    journey.end()
}
