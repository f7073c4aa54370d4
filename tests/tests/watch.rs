//! Watching a migration: live, as a trace, as a picture; and what `resolve` refuses.

use anyhow::{Context, Result, ensure};
use migration::Outcome;
use rustix::process::Signal;
use serde_json::Value;
use tests::{BareGuest, Journey, Migration, PATIENCE, TestHost, Vm, wait_for};

/// Ends a receiver that no guest moved to.
fn end(mut receiver: Vm) -> Result<()> {
    receiver.process.signal(Signal::TERM)?;
    receiver.wait_success(PATIENCE)
}

/// Waits until `status` shows a migration that `matches`.
fn wait_status(vm: &Vm, matches: impl Fn(&Value) -> bool) -> Result<Value> {
    wait_for("a status", || {
        Ok(Some(vm.status()?).filter(|status| matches(&status["migration"])))
    })
}

#[test]
fn status_shows_a_migration_while_it_runs() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 512,
        workset: "256M",
        rate: "max",
        ..Default::default()
    };
    let journey = Journey::start(TestHost::new()?, &guest, &[])?;
    let (receiver, endpoint) = journey.receiver("tcp:127.0.0.1:0")?;
    let migration = journey.vm.start_migration(
        &endpoint,
        &["--max-downtime", "1ms", "--bandwidth", "100MB/s", "--no-throttle"],
    )?;
    let status = wait_status(&journey.vm, |live| live["bytes_sent"].as_u64() > Some(0))?;
    let live = &status["migration"];
    ensure!(
        live["phase"] == "precopy" && live["total_bytes"] == 512 << 20,
        "got {status}"
    );
    let human = journey.vm.godwit("status", &[])?.expect_code(0)?.stdout.clone();
    ensure!(
        human.contains("pre-copy") && human.contains("remaining"),
        "got {human}"
    );
    journey.vm.godwit("cancel", &[])?.expect_code(0)?;
    Migration::of(migration.finish(PATIENCE)?)?.stayed(Outcome::Cancelled)?;
    ensure!(
        journey.vm.status()?["migration"].is_null(),
        "a migration that has ended is shown"
    );
    journey.vm.check_running()?;
    end(receiver)?;
    journey.end()
}

#[test]
fn a_trace_is_drawn() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let path = |name: &str| journey.host.path(name).display().to_string();
    let (trace, page, picture) = (path("trace"), path("page.html"), path("picture.svg"));
    let (receiver, endpoint) = journey.receiver("tcp:127.0.0.1:0")?;
    let finished = journey
        .vm
        .start_migration(&endpoint, &["--trace", &trace])?
        .finish(PATIENCE)?;
    let report: Value = serde_json::from_str(&finished.expect_code(0)?.stdout)?;
    journey.arrive(receiver)?;

    let text = std::fs::read_to_string(&trace)?;
    let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let header = &lines.first().context("an empty trace")?["trace"];
    ensure!(
        header["vm"] == "vm-0" && header["destination"] == endpoint && header["options"]["streams"] == 2,
        "got {header}"
    );
    ensure!(
        lines.last().is_some_and(|line| line["report"] == report),
        "the last line is not the report"
    );
    let times: Vec<f64> = lines[1..lines.len() - 1]
        .iter()
        .map(|line| {
            line["sample"]["elapsed_ms"]
                .as_f64()
                .context("a sample without a time")
        })
        .collect::<Result<_>>()?;
    ensure!(!times.is_empty() && times.is_sorted(), "got samples at {times:?}");

    let host = &journey.host;
    let drawn = host.godwit(["report", &trace])?.expect_code(0)?.stdout.clone();
    ensure!(
        drawn.starts_with("<svg ") && drawn.contains("vm-0 → tcp:"),
        "got {drawn}"
    );
    host.godwit(["report", &trace, "--output", &picture])?
        .expect_code(0)?;
    ensure!(
        std::fs::read_to_string(&picture)? == drawn,
        "a file is not what stdout is"
    );
    host.godwit(["report", &trace, "--output", &page])?
        .expect_code(0)?;
    ensure!(
        std::fs::read_to_string(&page)?.contains("<table>"),
        "no table in the page"
    );

    let other = host.godwit(["report", &trace, "--output", "picture.png"])?;
    ensure!(
        other.expect_code(2)?.stderr.contains(".svg or .html"),
        "got {}",
        other.stderr
    );
    let none = host.godwit(["report", &picture])?;
    ensure!(
        none.expect_code(1)?.stderr.contains("expected a trace"),
        "got {}",
        none.stderr
    );
    journey.end()
}

#[test]
fn without_its_trace_nothing_begins() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let (receiver, endpoint) = journey.receiver("tcp:127.0.0.1:0")?;
    let refused = journey
        .vm
        .start_migration(&endpoint, &["--trace", "/nowhere/trace"])?
        .finish(PATIENCE)?;
    ensure!(
        refused.expect_code(1)?.stderr.contains("/nowhere/trace") && refused.stdout.is_empty(),
        "got {refused:?}"
    );
    ensure!(journey.vm.status()?["migration"].is_null(), "it began");
    journey.hop_to(receiver, &endpoint, &[])?;
    journey.end()
}

#[test]
fn there_is_nothing_to_resolve_without_doubt() -> Result<()> {
    let journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let (receiver, _) = journey.receiver("tcp:127.0.0.1:0")?;
    for options in [&[][..], &["--run"], &["--discard"]] {
        let refused = journey.vm.godwit("resolve", options)?;
        ensure!(
            refused.expect_code(1)?.stderr.contains("nothing is in doubt"),
            "got {refused:?}"
        );
        let refused = receiver.godwit("resolve", options)?;
        ensure!(
            refused.expect_code(1)?.stderr.contains("nothing to decide"),
            "got {refused:?}"
        );
    }
    journey
        .vm
        .godwit("resolve", &["--run", "--discard"])?
        .expect_code(2)?;
    ensure!(receiver.state()? == "Receiving", "got {}", receiver.status()?);
    journey.vm.check_running()?;
    end(receiver)?;
    journey.end()
}
