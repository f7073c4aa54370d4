//! The control plane of one host: names, states, life cycle, console.

#[path = "control/unprivileged.rs"]
mod unprivileged;

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tests::{BareGuest, GuestEvent, Journey, PATIENCE, TestHost, TestProcess, Tick, Vm, http, http_as};

/// Ten ticks of the bare guest: a guest that is silent for so long does not tick.
const SILENCE: Duration = Duration::from_millis(500);
/// What a pause may take more than a command that changes nothing, on two cores that the guest keeps busy: far below
/// what a vCPU would need that is not kicked, and far above what a loaded machine adds.
const PAUSED_WITHIN: Duration = Duration::from_millis(250);

fn boot(host: &TestHost, name: &str) -> Result<Vm> {
    BareGuest::default().boot(host, name, &[])
}

/// Checks that no tick comes any more, after those that were on their way.
fn check_silent(vm: &Vm) -> Result<()> {
    let output = vm.process.stdout();
    let mut mark = output.mark();
    for _ in 0..3 {
        if output.wait("a tick", mark, SILENCE, Tick::parse).is_err() {
            return Ok(());
        }
        mark = output.mark();
    }
    anyhow::bail!("the guest ticks on: {}", output.text())
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_where_it_was() -> Result<()> {
    let mut journey = Journey::start(
        TestHost::new()?,
        &BareGuest {
            cpus: 2,
            ..Default::default()
        },
        &[],
    )?;
    journey.vm.godwit("pause", &[])?.expect_code(0)?;
    ensure!(journey.vm.state()? == "Paused", "got {}", journey.vm.status()?);
    check_silent(&journey.vm)?;
    journey.vm.godwit("resume", &[])?.expect_code(0)?;
    let tick = journey.vm.check_running()?;
    ensure!(
        tick.max_gap_us >= SILENCE.as_micros() as u64,
        "the guest's clock hides the pause: {tick:?}"
    );
    ensure!(journey.vm.state()? == "Running", "got {}", journey.vm.status()?);
    journey.verify()?;
    journey.end()
}

#[test]
fn resuming_what_runs_changes_nothing() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    journey.vm.godwit("resume", &[])?.expect_code(0)?;
    ensure!(journey.vm.state()? == "Running", "got {}", journey.vm.status()?);
    journey.vm.check_running()?;
    journey.verify()?;
    journey.end()
}

#[test]
fn pauses_are_quick() -> Result<()> {
    let host = TestHost::new()?;
    let vm = BareGuest {
        cpus: 4,
        rate: "max",
        ..Default::default()
    }
    .boot(&host, "busy", &[])?;
    let time = |command: &str| -> Result<Duration> {
        let begin = Instant::now();
        vm.godwit(command, &[])?.expect_code(0)?;
        Ok(begin.elapsed())
    };
    let (mut looked, mut paused) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        looked.push(time("status")?);
        paused.push(time("pause")?);
        vm.godwit("resume", &[])?.expect_code(0)?;
        vm.next_tick()?;
    }
    // The medians: the machine has few cores, and this guest keeps all of them busy.
    let median = |times: &mut Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    let (look, pause) = (median(&mut looked), median(&mut paused));
    ensure!(
        pause < look + PAUSED_WITHIN,
        "expected pauses within {PAUSED_WITHIN:?} and what a look takes, {look:?}, got {paused:?}"
    );
    Ok(())
}

#[test]
fn ps_lists_what_runs() -> Result<()> {
    let host = TestHost::new()?;
    let names = |host: &TestHost| -> Result<Vec<String>> {
        let listed: serde_json::Value =
            serde_json::from_str(&host.godwit(["ps", "--json"])?.expect_code(0)?.stdout)?;
        let vms = listed.as_array().context("expected a list")?;
        vms.iter()
            .map(|vm| Ok(vm["id"].as_str().context("id")?.to_owned()))
            .collect()
    };
    ensure!(names(&host)?.is_empty(), "VMs in a new run-time directory");
    let first = boot(&host, "first")?;
    let (_waiting, _) = host.receive("second", "tcp:127.0.0.1:0", [""; 0])?;
    ensure!(names(&host)? == ["first", "second"], "got {:?}", names(&host)?);
    let table = host.godwit(["ps"])?.expect_code(0)?.stdout.clone();
    for word in ["first", "running", "64 MiB", "second", "receiving"] {
        ensure!(table.contains(word), "expected {word} in {table}");
    }
    drop(first);
    ensure!(names(&host)? == ["second"], "got {:?}", names(&host)?);
    Ok(())
}

#[test]
fn a_name_in_use_is_refused_and_that_of_a_dead_vm_is_not() -> Result<()> {
    let host = TestHost::new()?;
    let options = BareGuest::default().options(&host)?;
    let vm = boot(&host, "web")?;
    let second = host.run("web", &options)?.process.finish(PATIENCE)?;
    second.expect_code(1)?;
    ensure!(
        second.stderr.contains("web.sock") && second.stderr.contains("in use"),
        "got {}",
        second.stderr
    );
    vm.check_running()?;

    vm.process.signal(Signal::KILL)?;
    drop(vm);
    ensure!(
        host.run_dir().join("web.sock").exists(),
        "a killed process removed its socket"
    );
    let mut vm = boot(&host, "web")?;
    vm.check_running()?;
    vm.process.send(b"q")?;
    vm.wait_success(PATIENCE)?;
    host.check_clean()
}

#[test]
fn stop_asks_and_then_ends() -> Result<()> {
    let host = TestHost::new()?;
    let mut vm = boot(&host, "deaf")?;
    // The bare guest does not handle the power button.
    let stopped = vm.godwit("stop", &[])?;
    ensure!(
        stopped.expect_code(0)?.stderr.contains("did not shut down"),
        "got {}",
        stopped.stderr
    );
    vm.wait_success(PATIENCE)?;

    let mut vm = boot(&host, "deaf")?;
    let begin = Instant::now();
    vm.godwit("stop", &["--force"])?.expect_code(0)?;
    vm.wait_success(PATIENCE)?;
    ensure!(
        begin.elapsed() < Duration::from_secs(4),
        "--force waited {:?}",
        begin.elapsed()
    );
    host.check_clean()
}

#[test]
fn sigterm_ends_any_vm_with_status_0() -> Result<()> {
    let host = TestHost::new()?;
    let mut vm = boot(&host, "deaf")?;
    vm.process.signal(Signal::TERM)?;
    vm.wait_success(PATIENCE)?;

    let mut twice = boot(&host, "twice")?;
    let begin = Instant::now();
    twice.process.signal(Signal::TERM)?;
    // Signals of one kind that are not taken yet become one.
    while twice.process.wait(Duration::from_millis(100)).is_err() {
        twice.process.signal(Signal::TERM)?;
    }
    ensure!(
        begin.elapsed() < Duration::from_secs(4),
        "a second SIGTERM waited {:?}",
        begin.elapsed()
    );

    let (mut waiting, _) = host.receive("waiting", "tcp:127.0.0.1:0", [""; 0])?;
    waiting.process.signal(Signal::TERM)?;
    waiting.wait_success(PATIENCE)?;
    host.check_clean()
}

#[test]
fn the_console_shows_and_types() -> Result<()> {
    let host = TestHost::new()?;
    let mut vm = boot(&host, "talker")?;
    let mut console = TestProcess::spawn(host.command(["console", "talker"]))?;
    console.stdout().wait("a tick", 0, PATIENCE, Tick::parse)?;
    console.send(b"r")?;
    console
        .stdout()
        .wait("reset", 0, PATIENCE, |line| GuestEvent::named(line, "reset"))?;
    // Ctrl-] detaches; the guest runs on.
    console.send(&[0x1d])?;
    console.wait_success(PATIENCE)?;
    vm.check_running()?;

    let mut until_the_end = TestProcess::spawn(host.command(["console", "talker"]))?;
    until_the_end.stdout().wait("a tick", 0, PATIENCE, Tick::parse)?;
    vm.process.send(b"q")?;
    vm.wait_success(PATIENCE)?;
    until_the_end.wait_success(PATIENCE)
}

#[test]
fn an_api_socket_of_ones_own_and_a_log_file() -> Result<()> {
    let host = TestHost::new()?;
    let (socket, log) = (host.path("api.sock"), host.path("log"));
    let get = |path| http(&host.path("api.sock"), "GET", path, "");
    let (socket, log) = (socket.display().to_string(), log.display().to_string());
    let mut vm = BareGuest::default().boot(&host, "apart", &["--api-sock", &socket, "--log", &log])?;
    host.godwit(["pause", &socket])?.expect_code(0)?;
    host.check_clean()?;
    ensure!(get("/")?.contains("\"state\":\"Paused\""), "got {}", get("/")?);
    ensure!(
        get("/version")?.contains("godwit_version") && get("/version")?.contains("firecracker_version"),
        "got {}",
        get("/version")?
    );
    ensure!(
        get("/nothing")?.starts_with("HTTP/1.1 404") && get("/nothing")?.contains("fault_message"),
        "got {}",
        get("/nothing")?
    );
    let wrong = http(&host.path("api.sock"), "DELETE", "/vm", "")?;
    ensure!(
        wrong.starts_with("HTTP/1.1 405") && wrong.contains("fault_message"),
        "got {wrong}"
    );
    // The content type that curl sends by default.
    let pause = r#"{"state": "Paused"}"#;
    let form = http_as(
        &host.path("api.sock"),
        "application/x-www-form-urlencoded",
        "PATCH",
        "/vm",
        pause,
    )?;
    ensure!(form.starts_with("HTTP/1.1 204"), "got {form}");
    host.godwit(["resume", &socket])?.expect_code(0)?;
    vm.process.send(b"q")?;
    vm.wait_success(PATIENCE)?;
    let logged = std::fs::read_to_string(&log)?;
    ensure!(
        logged.contains("CPU template"),
        "expected the choice of the CPU template in {logged:?}"
    );
    ensure!(
        vm.process.stderr().text().is_empty(),
        "got {}",
        vm.process.stderr().text()
    );
    ensure!(
        !std::path::Path::new(&socket).exists(),
        "the socket's file is still there"
    );
    Ok(())
}

#[test]
fn the_probe_and_the_version() -> Result<()> {
    let host = TestHost::new()?;
    let probe = host.fixtures().probe()?;
    for field in [
        "boot",
        "migration",
        "postcopy",
        "kvm",
        "cpu_template",
        "tsc_khz",
        "memory_bytes",
        "checks",
    ] {
        ensure!(!probe[field].is_null(), "no {field} in {probe}");
    }
    let said = host.godwit(["probe"])?.expect_code(0)?.stdout.clone();
    ensure!(
        said.contains("boots guests:") && said.contains("CPU template:"),
        "got {said}"
    );
    let version = host.godwit(["--version"])?.expect_code(0)?.stdout.clone();
    ensure!(version.starts_with("godwit "), "got {version}");
    Ok(())
}

#[test]
fn a_static_binary() -> Result<()> {
    let host = TestHost::new()?;
    let linked = TestProcess::run(
        {
            let mut command = Command::new("ldd");
            command.arg(&host.fixtures().godwit);
            command
        },
        PATIENCE,
    )?;
    let said = linked.stdout + &linked.stderr;
    ensure!(
        said.contains("statically linked") || said.contains("not a dynamic executable"),
        "got {said}"
    );
    Ok(())
}
