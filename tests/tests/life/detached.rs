//! VMs that their starter does not stay with, and logs that outlive them.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tests::{BareGuest, Finished, GuestEvent, PATIENCE, TestHost, TestProcess, Tick, wait_until};

/// A VM that no command waits for. It ends with this.
struct Detached {
    host: TestHost,
    name: &'static str,
}

impl Detached {
    /// Starts one with `command`; what that said.
    fn start(
        host: &TestHost,
        name: &'static str,
        command: &str,
        options: &[String],
    ) -> Result<(Self, Finished)> {
        let mut all = vec![
            command.to_owned(),
            "--detach".into(),
            "--name".into(),
            name.into(),
        ];
        all.extend_from_slice(options);
        let vm = Self {
            host: host.clone(),
            name,
        };
        // The command's output ends when no process has it open any more, so the VM must not have it.
        let finished = host.godwit(all)?;
        finished.expect_code(0)?;
        ensure!(finished.stdout == format!("{name}\n"), "got {finished:?}");
        Ok((vm, finished))
    }

    fn godwit(&self, command: &str, more: &[&str]) -> Result<String> {
        let finished = self.host.godwit([&[command, self.name], more].concat())?;
        Ok(finished.expect_code(0)?.stdout.clone())
    }

    fn check_ticks(&self) -> Result<()> {
        let mut console = TestProcess::spawn(self.host.command(["console", self.name]))?;
        for _ in 0..2 {
            let mark = console.stdout().mark();
            console.stdout().wait("a tick", mark, PATIENCE, Tick::parse)?;
        }
        console.send(&[0x1d])?;
        console.wait_success(PATIENCE)
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.host.godwit(["stop", "--force", self.name]);
    }
}

/// What is left in the run-time directory.
fn left(directory: &Path) -> Result<Vec<String>> {
    let mut names: Vec<_> = std::fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

#[test]
fn a_detached_vm_is_up_when_its_command_ends_and_its_log_outlives_it() -> Result<()> {
    let host = TestHost::new()?;
    let options = BareGuest::default().options(&host)?;
    let (vm, _) = Detached::start(&host, "web", "run", &options)?;
    ensure!(vm.godwit("status", &[])?.contains("web: running"));
    vm.check_ticks()?;
    ensure!(vm.godwit("logs", &[])?.contains("CPU template"));

    let mut follower = TestProcess::spawn(host.command(["logs", "--follow", "web"]))?;
    let has_template = |line: &str| line.contains("CPU template").then_some(());
    follower.stdout().wait("the log", 0, PATIENCE, has_template)?;
    // No other VM may take a running VM's log.
    let second = host.godwit(
        ["run", "--detach", "--name", "web"]
            .map(String::from)
            .iter()
            .chain(&options),
    )?;
    ensure!(second.expect_code(1)?.stderr.contains("in use"), "got {second:?}");
    vm.godwit("stop", &["--force"])?;
    follower.wait_success(PATIENCE)?;
    ensure!(
        follower.stdout().text().contains("stopped"),
        "{}",
        follower.stdout().text()
    );

    let log = vm.godwit("logs", &["--follow"])?;
    ensure!(
        log.contains("CPU template") && log.contains("stopped"),
        "got {log}"
    );
    ensure!(
        left(&host.run_dir())? == ["web.log"],
        "got {:?}",
        left(&host.run_dir())?
    );
    drop(vm);
    let (again, _) = Detached::start(&host, "web", "run", &options)?;
    let log = again.godwit("logs", &[])?;
    ensure!(
        log.contains("CPU template") && !log.contains("stopped"),
        "got {log}"
    );
    Ok(())
}

#[test]
fn why_a_detached_vm_is_not_up_is_said_by_its_starter() -> Result<()> {
    let host = TestHost::new()?;
    let start = |options: &[&str]| host.godwit([&["run", "--detach", "--name", "web"], options].concat());
    let missing = start(&["--kernel", "/nowhere/vmlinux"])?;
    ensure!(
        missing.expect_code(1)?.stderr.contains("/nowhere/vmlinux"),
        "got {missing:?}"
    );
    let cpus = start(&["--kernel", "/nowhere/vmlinux", "--cpus", "33"])?;
    ensure!(cpus.expect_code(2)?.stderr.contains("cpus"), "got {cpus:?}");
    ensure!(missing.stdout.is_empty() && cpus.stdout.is_empty());
    let logs = host.godwit(["logs", "nobody"])?;
    ensure!(
        logs.expect_code(1)?.stderr.contains("no VM \"nobody\""),
        "got {logs:?}"
    );
    Ok(())
}

#[test]
fn a_guest_moves_to_a_detached_vm_and_comes_out_of_files_in_one() -> Result<()> {
    let host = TestHost::new()?;
    let mut source = BareGuest::default().boot(&host, "source", &[])?;
    let listen = ["--listen", "tcp:127.0.0.1:0"].map(String::from);
    let (web, said) = Detached::start(&host, "web", "receive", &listen)?;
    let endpoint = said
        .stderr
        .lines()
        .find_map(|line| line.strip_prefix("godwit: web is listening on "));
    source
        .migrate(endpoint.context("where it listens")?, &[])?
        .moved()?;
    source.wait_success(PATIENCE)?;
    wait_until("the news in the log", || {
        Ok(web.godwit("logs", &[])?.contains("the guest runs here"))
    })?;
    web.check_ticks()?;

    let directory = host.path("saved").display().to_string();
    web.godwit("snapshot", &[&directory])?;
    let options = [directory, "--resume".into()];
    let (clone, said) = Detached::start(&host, "clone", "restore", &options)?;
    ensure!(said.stderr.contains("clone is restored"), "got {said:?}");
    clone.check_ticks()
}

#[test]
fn the_log_of_a_vm_that_is_not_detached() -> Result<()> {
    let host = TestHost::new()?;
    let plain = BareGuest::default().boot(&host, "plain", &[])?;
    let refused = plain.godwit("logs", &[])?;
    ensure!(
        refused.expect_code(1)?.stderr.contains("--log FILE"),
        "got {refused:?}"
    );
    // A path of the log is found from any folder.
    let vm = BareGuest::default().boot(&host, "kept", &["--log", "kept.log"])?;
    let mut command = host.command(["logs", "kept"]);
    command.current_dir("/");
    let printed = TestProcess::run(command, PATIENCE)?;
    ensure!(
        printed.expect_code(0)?.stdout.contains("CPU template"),
        "got {printed:?}"
    );
    vm.check_running()?;
    let output = vm.process.stdout();
    output.wait("bare: ready", 0, PATIENCE, |line| {
        GuestEvent::named(line, "ready")
    })?;
    Ok(())
}

/// Processes whose parent is this one.
fn children(parent: u32) -> Result<Vec<u32>> {
    let ours = format!("PPid:\t{parent}\n");
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Ok(id) = entry?.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        if status.contains(&ours) {
            found.push(id);
        }
    }
    Ok(found)
}

#[test]
fn an_interrupted_starter_takes_the_vm_along_that_is_not_up() -> Result<()> {
    let host = TestHost::new()?;
    let fifo = host.path("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )?;
    let fifo = fifo.display().to_string();
    let command = host.command(["run", "--detach", "--name", "never", "--config-file", &fifo]);
    let starter = TestProcess::spawn(command)?;
    wait_until("the VM's process", || Ok(children(starter.id())?.len() == 1))?;
    let vm = children(starter.id())?;
    let status = format!("/proc/{}/status", vm[0]);
    // It waits for a program that writes to the FIFO.
    wait_until("the VM's own session", || {
        Ok(std::fs::read_to_string(&status)?.contains(&format!("NSsid:\t{}\n", vm[0])))
    })?;
    starter.signal(rustix::process::Signal::INT)?;
    drop(starter);
    wait_until("the end of the VM's process", || {
        let left = std::fs::read_to_string(&status).unwrap_or_default();
        Ok(left.is_empty() || left.contains("State:\tZ"))
    })
}
