//! A VM's life as those outside see it: how it ends, what its exit status says, and VMs that do not answer.

#[path = "life/detached.rs"]
mod detached;
#[path = "life/jobs.rs"]
mod jobs;
#[path = "life/silence.rs"]
mod silence;

use std::fs::File;

use anyhow::{Result, ensure};
use tests::{BareGuest, GuestEvent, PATIENCE, TestHost, Vm};

/// Waits for the guest to be up after a mark of its output.
fn wait_ready(vm: &Vm, mark: usize) -> Result<()> {
    vm.process.stdout().wait("bare: ready", mark, PATIENCE, |line| {
        GuestEvent::named(line, "ready")
    })?;
    vm.tick_from(mark)?;
    Ok(())
}

#[test]
fn the_exit_status_says_how_a_guest_ended() -> Result<()> {
    let host = TestHost::new()?;
    for (command, code, reason) in [
        (b"q", 0, "it reset"),
        (b"p", 4, "the guest panicked"),
        (b"t", 4, "triple fault"),
    ] {
        let mut vm = BareGuest::default().boot(&host, "web", &[])?;
        vm.process.send(command)?;
        let finished = vm.process.finish(PATIENCE)?;
        finished.expect_code(code)?;
        ensure!(finished.stderr.contains(reason), "got {}", finished.stderr);
        host.check_clean()?;
    }
    Ok(())
}

#[test]
fn a_guest_that_resets_boots_again_in_the_same_process() -> Result<()> {
    let host = TestHost::new()?;
    let image = host.path("disk");
    File::create(&image)?.set_len(1 << 20)?;
    // Its lock and its socket have to be free before the guest can have them again.
    let (disk, uds) = (
        format!("path={}", image.display()),
        format!("cid=3,uds={}", host.path("web.vsock").display()),
    );
    let options = ["--on-reset", "reboot", "--disk", &disk, "--vsock", &uds];
    let mut vm = BareGuest::default().boot(&host, "web", &options)?;
    for _ in 0..2 {
        let mark = vm.process.stdout().mark();
        vm.process.send(b"q")?;
        wait_ready(&vm, mark)?;
        vm.check_running()?;
        ensure!(vm.state()? == "Running", "got {}", vm.status()?);
        ensure!(vm.status()?["pid"] == vm.process.id(), "got {}", vm.status()?);
        // It has a machine like the first one, which can be paused, and moved.
        vm.godwit("pause", &[])?.expect_code(0)?;
        vm.godwit("resume", &[])?.expect_code(0)?;
        vm.next_tick()?;
    }
    vm.process.send(b"p")?;
    let finished = vm.process.finish(PATIENCE)?;
    finished.expect_code(4)?;
    host.check_clean()
}

#[test]
fn a_guest_that_has_moved_ends_when_it_resets() -> Result<()> {
    let host = TestHost::new()?;
    let mut source = BareGuest::default().boot(&host, "source", &["--on-reset", "reboot"])?;
    let (mut vm, endpoint) = host.receive("web", "tcp:127.0.0.1:0", [""; 0])?;
    source.migrate(&endpoint, &[])?.moved()?;
    source.wait_success(PATIENCE)?;
    vm.next_tick()?;
    vm.process.send(b"q")?;
    vm.wait_success(PATIENCE)?;
    host.check_clean()
}

#[test]
fn the_time_to_shut_down_is_the_operators() -> Result<()> {
    let host = TestHost::new()?;
    // The bare guest does not handle the power button.
    let mut vm = BareGuest::default().boot(&host, "web", &["--stop-timeout", "100ms"])?;
    let stopped = vm.godwit("stop", &[])?;
    ensure!(
        stopped.expect_code(0)?.stderr.contains("within 100ms"),
        "got {}",
        stopped.stderr
    );
    vm.wait_success(PATIENCE)?;

    let mut vm = BareGuest::default().boot(&host, "web", &["--stop-timeout", "100ms"])?;
    vm.process.signal(rustix::process::Signal::TERM)?;
    vm.wait_success(PATIENCE)?;
    let log = vm.process.stderr().text();
    ensure!(log.contains("did not shut down within 100ms"), "got {log}");

    let mut vm = BareGuest::default().boot(&host, "web", &["--stop-timeout", "1h"])?;
    vm.godwit("stop", &["--timeout", "0s"])?.expect_code(0)?;
    vm.wait_success(PATIENCE)?;
    host.check_clean()
}
