//! VMs whose process does not answer, and copies of a guest that no command may throw away by mistake.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tests::{BareGuest, PATIENCE, TestHost, Vm};

/// How long a command about a VM that does not answer may take: the longest deadline that one here has, and the command's
/// own start on a busy machine.
const BOUND: Duration = Duration::from_secs(30);

/// Runs `work`, which is to end in time.
fn in_time<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let done = work()?;
    ensure!(begin.elapsed() < BOUND, "{what} took {:?}", begin.elapsed());
    Ok(done)
}

#[test]
fn a_vm_that_does_not_answer_holds_up_no_other_command() -> Result<()> {
    let host = TestHost::new()?;
    let mut hung = BareGuest::default().boot(&host, "hung", &[])?;
    let well = BareGuest::default().boot(&host, "well", &[])?;
    hung.process.signal(Signal::STOP)?;

    let listed = in_time("ps", || host.godwit(["ps", "--json"]))?;
    let listed: Value = serde_json::from_str(&listed.expect_code(0)?.stdout)?;
    let states = |id: &str| {
        let vms = listed.as_array().into_iter().flatten();
        vms.filter(|vm| vm["id"] == id)
            .map(|vm| (vm["state"].clone(), vm["pid"].clone()))
            .collect::<Vec<_>>()
    };
    ensure!(
        states("hung") == [("No answer".into(), hung.process.id().into())],
        "got {listed}"
    );
    ensure!(
        states("well") == [("Running".into(), well.process.id().into())],
        "got {listed}"
    );
    for command in ["status", "stop", "metrics", "cancel"] {
        let refused = in_time(command, || hung.godwit(command, &[]))?;
        ensure!(
            refused.expect_code(1)?.stderr.contains("no answer within"),
            "{command}: got {}",
            refused.stderr
        );
    }
    well.check_running()?;

    let stopped = in_time("stop --force", || hung.godwit("stop", &["--force"]))?;
    ensure!(
        stopped.expect_code(0)?.stderr.contains("ending its process"),
        "got {}",
        stopped.stderr
    );
    let status = hung.process.wait(PATIENCE)?;
    ensure!(
        status.code().is_none(),
        "expected the end by a signal, got {status}"
    );
    let listed = host.godwit(["ps"])?.expect_code(0)?.stdout.clone();
    ensure!(
        !listed.contains("hung") && listed.contains("well"),
        "got {listed}"
    );
    well.check_running()?;
    Ok(())
}

#[test]
fn a_process_that_is_no_vm_is_not_ended() -> Result<()> {
    let host = TestHost::new()?;
    // No process accepts connections on it.
    let socket = host.path("other.sock");
    let _other = UnixListener::bind(&socket)?;
    let socket = socket.display().to_string();
    let refused = in_time("stop --force", || host.godwit(["stop", "--force", &socket]))?;
    ensure!(
        refused
            .expect_code(1)?
            .stderr
            .contains("expected godwit behind it"),
        "got {}",
        refused.stderr
    );
    Ok(())
}

/// A guest that cannot run where it was moved to, because another process has the path of its socket. It is paused
/// there, in doubt.
fn in_doubt(host: &TestHost) -> Result<(Vm, Vm, UnixListener)> {
    let uds = host.path("source.vsock").display().to_string();
    let source = BareGuest::default().boot(host, "source", &["--vsock", &format!("cid=3,uds={uds}")])?;
    let taken = host.path("taken.vsock");
    let other = UnixListener::bind(&taken)?;
    let uds = format!("uds={}", taken.display());
    let (kept, endpoint) = host.receive("kept", "tcp:127.0.0.1:0", ["--vsock", &uds])?;
    let migration = source.migrate(&endpoint, &["--on-miss", "switch"])?;
    ensure!(migration.code == Some(3), "expected doubt, got {migration:?}");
    for vm in [&source, &kept] {
        ensure!(vm.state()? == "In doubt", "got {}", vm.status()?);
    }
    Ok((source, kept, other))
}

#[test]
fn a_copy_in_doubt_outlives_one_request_for_its_end() -> Result<()> {
    let host = TestHost::new()?;
    let (source, mut kept, _other) = in_doubt(&host)?;
    for vm in [&source, &kept] {
        for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
            vm.process.signal(signal)?;
        }
        let told = |line: &str| line.contains("may be the only copy").then_some(());
        vm.process.stderr().wait("the refusal", 0, PATIENCE, told)?;
        let refused = vm.godwit("stop", &[])?;
        ensure!(
            refused.expect_code(3)?.stderr.contains("godwit resolve"),
            "got {}",
            refused.stderr
        );
        ensure!(vm.state()? == "In doubt", "got {}", vm.status()?);
    }
    // Asked again, and not by what came with the first, it goes.
    let mut requests = 0;
    let status = loop {
        match kept.process.wait(Duration::from_millis(1500)) {
            Ok(status) => break status,
            Err(waits) if requests == 40 => return Err(waits),
            Err(_) => kept.process.signal(Signal::TERM)?,
        }
        requests += 1;
    };
    ensure!(
        status.success() && requests > 0,
        "got {status} after {requests} requests"
    );
    // So the other one was worth keeping.
    source.godwit("resolve", &["--run"])?.expect_code(0)?;
    source.check_running()?;
    Ok(())
}

#[test]
fn a_copy_in_doubt_goes_by_force() -> Result<()> {
    let host = TestHost::new()?;
    let (mut source, mut kept, _other) = in_doubt(&host)?;
    for vm in [&mut source, &mut kept] {
        vm.godwit("stop", &["--force"])?.expect_code(0)?;
        vm.wait_success(PATIENCE)?;
    }
    host.check_clean()
}
