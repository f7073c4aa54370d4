//! VMs as jobs of a shell: in the background, stopped, and back in the foreground.

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, getpgid, kill_process};
use rustix::termios::LocalModes;
use tests::{BareGuest, GuestEvent, PATIENCE, Shell, TestHost, Tick, wait_until};

/// A shell on a terminal of its own in which `godwit run` is started in the background, and that VM's process.
fn in_background(host: &TestHost) -> Result<(Shell, Pid)> {
    let mut command = host.command(["run", "--name", "web"]);
    command.args(BareGuest::default().options(host)?);
    let mut shell = Shell::start(host)?;
    shell.type_command(&command, " &")?;
    let ready = |line: &str| line.contains("bare: ready").then_some(());
    shell.output().wait("bare: ready", 0, PATIENCE, ready)?;
    let status = host.godwit(["status", "web", "--json"])?;
    let status: serde_json::Value = serde_json::from_str(&status.expect_code(0)?.stdout)?;
    let pid = status["pid"].as_i64().and_then(|pid| Pid::from_raw(pid as i32));
    Ok((shell, pid.context("pid")?))
}

/// Waits for ticks that come from now on.
fn check_ticks(shell: &Shell) -> Result<()> {
    for _ in 0..2 {
        let mark = shell.output().mark();
        shell
            .output()
            .wait("a tick", mark, PATIENCE, |line| Tick::parse(line.trim_end()))?;
    }
    Ok(())
}

fn is_stopped(pid: Pid) -> Result<bool> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(status.lines().any(|line| line.starts_with("State:\tT")))
}

/// Types a key that the guest answers, without a line's end: that only works in a raw terminal.
fn check_keys(shell: &mut Shell, vm: Pid) -> Result<()> {
    let group = getpgid(Some(vm))?;
    wait_until("the VM to have a raw terminal", || {
        Ok(shell.foreground()? == group && !shell.modes()?.contains(LocalModes::ICANON))
    })?;
    let mark = shell.output().mark();
    shell.type_text("r")?;
    let answered = |line: &str| GuestEvent::named(line.trim_end(), "reset");
    shell.output().wait("reset", mark, PATIENCE, answered)?;
    Ok(())
}

#[test]
fn a_vm_in_the_background_runs_on_and_comes_to_the_foreground() -> Result<()> {
    let host = TestHost::new()?;
    let (mut shell, vm) = in_background(&host)?;
    check_ticks(&shell)?;
    ensure!(!is_stopped(vm)?, "the terminal has stopped the guest");
    // The shell reads what is typed.
    shell.type_text("echo the shell $((40 + 2)) hears\n")?;
    let heard = |line: &str| line.contains("the shell 42 hears").then_some(());
    shell.output().wait("the shell", 0, PATIENCE, heard)?;
    ensure!(!is_stopped(vm)?, "what was typed has stopped the guest");

    shell.type_text("fg\n")?;
    check_keys(&mut shell, vm)?;
    // Stopped, on in the background, and back.
    kill_process(vm, Signal::STOP)?;
    wait_until("the stop", || is_stopped(vm))?;
    shell.type_text("bg\n")?;
    wait_until("it to go on", || Ok(!is_stopped(vm)?))?;
    check_ticks(&shell)?;
    shell.type_text("echo and $((40 + 3)) too\n")?;
    let heard = |line: &str| line.contains("and 43 too").then_some(());
    shell.output().wait("the shell", 0, PATIENCE, heard)?;
    ensure!(!is_stopped(vm)?, "the terminal has stopped the guest");
    shell.type_text("fg\n")?;
    check_keys(&mut shell, vm)?;
    // Stopped, and straight back: the shell had the terminal in between.
    kill_process(vm, Signal::STOP)?;
    wait_until("the stop", || is_stopped(vm))?;
    shell.type_text("fg\n")?;
    check_keys(&mut shell, vm)?;
    // A shell may be late with the modes of a terminal that it has handed over.
    shell.cook()?;
    check_keys(&mut shell, vm)?;

    // The shell has its terminal again when the guest has ended.
    let group = getpgid(Some(vm))?;
    shell.type_text("q")?;
    wait_until("the shell to have its terminal", || {
        Ok(shell.foreground()? != group)
    })?;
    let mark = shell.output().mark();
    shell.type_text("stty -a; echo status $((50 + 1))\n")?;
    let ended = |line: &str| line.contains("status 51").then_some(());
    shell.output().wait("the shell", mark, PATIENCE, ended)?;
    let modes = shell.output().text();
    let modes = modes
        .lines()
        .rev()
        .find(|line| line.contains("icanon"))
        .context("stty")?;
    ensure!(!modes.contains("-icanon"), "got {modes}");
    host.check_clean()
}

#[test]
fn a_vm_in_the_background_ends_there() -> Result<()> {
    let host = TestHost::new()?;
    let (mut shell, _) = in_background(&host)?;
    host.godwit(["stop", "--force", "web"])?.expect_code(0)?;
    shell.type_text("wait; echo status $((50 + 1))\n")?;
    let ended = |line: &str| line.contains("status 51").then_some(());
    shell.output().wait("the shell", 0, PATIENCE, ended)?;
    host.check_clean()
}
