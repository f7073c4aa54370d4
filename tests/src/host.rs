//! One host's `godwit`: a run-time directory of its own, and the VMs in it.

use std::ffi::{OsStr, OsString};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use lab::WaitLimit;
use migration::{Outcome, Report};
use serde_json::Value;
use tempfile::TempDir;

use crate::{Elsewhere, Finished, Fixtures, GuestEvent, PATIENCE, TestProcess, Tick};

/// A place where VMs run; clones are the same place.
#[derive(Clone)]
pub struct TestHost {
    inner: Arc<TestHostInner>,
}

struct TestHostInner {
    fixtures: Fixtures,
    directory: TempDir,
}

/// A VM's process: `godwit run` or `godwit receive`.
pub struct Vm {
    /// Its name.
    pub name: String,
    /// The process.
    pub process: TestProcess,
    host: TestHost,
}

/// How `godwit migrate --json` ended.
#[derive(Debug)]
pub struct Migration {
    /// The command's exit code.
    pub code: Option<i32>,
    /// The report, if it printed one.
    pub report: Option<Report>,
    /// What it said on stderr.
    pub stderr: String,
}

impl TestHost {
    /// A new place with nothing in it, for what the environment names.
    pub fn new() -> Result<Self> {
        Self::with(Fixtures::from_env()?)
    }

    /// A new place with nothing in it.
    pub fn with(fixtures: Fixtures) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("godwit-test-")
            .tempdir()
            .context("temporary directory")?;
        std::fs::create_dir(directory.path().join("run"))?;
        Ok(Self {
            inner: Arc::new(TestHostInner { fixtures, directory }),
        })
    }

    /// The program and the guests.
    pub fn fixtures(&self) -> &Fixtures {
        &self.inner.fixtures
    }

    /// The first of `vm-1` and so on that no running VM has here. The name of a VM that was killed is free: the next VM
    /// of that name takes over what the killed one left behind.
    pub fn free_name(&self) -> String {
        let taken = |name: &String| UnixStream::connect(self.run_dir().join(format!("{name}.sock"))).is_ok();
        let mut names = (1..).map(|number: u32| format!("vm-{number}"));
        names.find(|name| !taken(name)).unwrap_or_default()
    }

    /// A path for a file of the test, outside the run-time directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.inner.directory.path().join(name)
    }

    /// The directory with the VMs' sockets; it exists once a VM ran.
    pub fn run_dir(&self) -> PathBuf {
        self.inner.directory.path().join("run/godwit")
    }

    /// A `godwit` command.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(&self.inner.fixtures.godwit);
        command
            .args(arguments)
            .env("XDG_RUNTIME_DIR", self.inner.directory.path().join("run"));
        command
            .current_dir(self.inner.directory.path())
            .env_remove("GODWIT_LOG");
        command
    }

    /// Runs a `godwit` command to its end.
    pub fn godwit<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Finished> {
        TestProcess::run(self.command(arguments), PATIENCE)
    }

    /// Starts `godwit run`.
    pub fn run<S: AsRef<OsStr>>(&self, name: &str, arguments: impl IntoIterator<Item = S>) -> Result<Vm> {
        let mut command = self.command(["run", "--name", name]);
        command.args(arguments);
        self.start(name, command)
    }

    /// Starts `godwit receive` and waits until it listens; also returns where.
    pub fn receive<S: AsRef<OsStr>>(
        &self,
        name: &str,
        listen: &str,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<(Vm, String)> {
        let mut command = self.command(["receive", "--name", name, "--listen", listen]);
        command.args(arguments);
        self.start_receiver(name, command)
    }

    /// The same with a command that is ready to run.
    pub fn start_receiver(&self, name: &str, command: Command) -> Result<(Vm, String)> {
        let vm = self.start(name, command)?;
        let prefix = format!("godwit: {name} is listening on ");
        let listens = |line: &str| line.strip_prefix(&prefix).map(str::to_owned);
        let endpoint = vm
            .process
            .stderr()
            .wait("the receiver's endpoint", 0, PATIENCE, listens)?;
        Ok((vm, endpoint))
    }

    /// Starts `godwit restore` under a name of its own and waits until it has its guest.
    pub fn restore(&self, directory: &Path, arguments: &[&str]) -> Result<Vm> {
        self.restore_as(&self.free_name(), directory, arguments)
    }

    /// The same under any name.
    pub fn restore_as(&self, name: &str, directory: &Path, arguments: &[&str]) -> Result<Vm> {
        let mut command = self.command(["restore", "--name", name]);
        command.arg(directory).args(arguments);
        self.start_restored(name, command)
    }

    /// As [`TestHost::restore`], with `godwit` as the last arguments of another program that runs it.
    pub fn restore_under(&self, program: &[OsString], directory: &Path, arguments: &[&str]) -> Result<Vm> {
        let name = self.free_name();
        let mut godwit = self.command(["restore", "--name", &name]);
        godwit.arg(directory).args(arguments);
        self.start_restored(&name, self.under(program, &godwit)?)
    }

    /// A `godwit` command as the last arguments of another program that runs it.
    pub fn under(&self, program: &[OsString], godwit: &Command) -> Result<Command> {
        let (first, rest) = program.split_first().context("a program")?;
        let mut command = Command::new(first);
        command
            .args(rest)
            .arg(godwit.get_program())
            .args(godwit.get_args());
        command.current_dir(self.inner.directory.path());
        for (key, value) in godwit.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        Ok(command)
    }

    fn start_restored(&self, name: &str, command: Command) -> Result<Vm> {
        let prefix = format!("godwit: {name} is restored");
        let vm = self.start(name, command)?;
        let restored = |line: &str| line.starts_with(&prefix).then_some(());
        vm.process
            .stderr()
            .wait("the guest to be restored", 0, PATIENCE, restored)?;
        Ok(vm)
    }

    /// Starts a command that is ready to run, and is to have a VM of this name.
    pub fn start(&self, name: &str, command: Command) -> Result<Vm> {
        self.start_to(name, command, Elsewhere::default())
    }

    /// The same with some of its output elsewhere.
    pub fn start_to(&self, name: &str, command: Command, elsewhere: Elsewhere) -> Result<Vm> {
        Ok(Vm {
            name: name.into(),
            process: TestProcess::spawn_to(command, elsewhere)?,
            host: self.clone(),
        })
    }

    /// Fails if a VM left something in the run-time directory.
    pub fn check_clean(&self) -> Result<()> {
        let left = entries(&self.run_dir())?;
        ensure!(left.is_empty(), "left behind in the run-time directory: {left:?}");
        Ok(())
    }
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    if !directory.exists() {
        return Ok(Vec::new());
    }
    std::fs::read_dir(directory)?
        .map(|entry| Ok(entry?.path()))
        .collect()
}

impl Vm {
    /// A `godwit` command about this VM: `arguments` with the VM's name after the first.
    pub fn godwit(&self, command: &str, arguments: &[&str]) -> Result<Finished> {
        self.host.godwit([command, &self.name].iter().chain(arguments))
    }

    /// `godwit status --json`.
    pub fn status(&self) -> Result<Value> {
        let finished = self.godwit("status", &["--json"])?;
        serde_json::from_str(&finished.expect_code(0)?.stdout).context("status")
    }

    /// Where it is.
    pub fn host(&self) -> &TestHost {
        &self.host
    }

    /// Its state, as `status` names it.
    pub fn state(&self) -> Result<String> {
        Ok(self.status()?["state"]
            .as_str()
            .context("status has no state")?
            .to_owned())
    }

    /// Waits for the next whole tick from now on.
    pub fn next_tick(&self) -> Result<Tick> {
        self.tick_from(self.process.stdout().mark())
    }

    /// Waits for a tick at or after a mark of the output.
    pub fn tick_from(&self, mark: usize) -> Result<Tick> {
        self.process.stdout().wait("a tick", mark, PATIENCE, Tick::parse)
    }

    /// Shows that the guest runs and is well: two ticks from now on, without errors, the counter going forward.
    pub fn check_running(&self) -> Result<Tick> {
        let first = self.next_tick()?;
        let second = self.next_tick()?;
        ensure!(
            second.n > first.n && second.us > first.us,
            "expected ticks to go on, got {first:?} and {second:?}"
        );
        ensure!(second.errors == 0, "the guest counts errors: {second:?}");
        Ok(second)
    }

    /// Migrates it and waits for the end of that.
    pub fn migrate(&self, destination: &str, arguments: &[&str]) -> Result<Migration> {
        Migration::of(self.start_migration(destination, arguments)?.finish(PATIENCE)?)
    }

    /// Starts `godwit migrate --json`.
    pub fn start_migration(&self, destination: &str, arguments: &[&str]) -> Result<TestProcess> {
        self.start_migration_to(destination, arguments, Elsewhere::default())
    }

    /// The same with some of its output elsewhere.
    pub fn start_migration_to(
        &self,
        destination: &str,
        arguments: &[&str],
        elsewhere: Elsewhere,
    ) -> Result<TestProcess> {
        let mut command = self.host.command(["migrate", &self.name, destination, "--json"]);
        command.args(arguments);
        TestProcess::spawn_to(command, elsewhere)
    }

    /// Puts the guest in the files of a new directory; the report.
    pub fn snapshot(&self, directory: &Path, arguments: &[&str]) -> Result<Value> {
        let directory = directory.to_str().context("a path that is no UTF-8")?;
        let finished = self.godwit("snapshot", &[&[directory, "--json"], arguments].concat())?;
        serde_json::from_str(&finished.expect_code(0)?.stdout).context("report")
    }

    /// Has the bare guest's balloon filled up to so many MiB, or emptied. Returns how many pages it has taken back since it
    /// was started, and how many of them were zero.
    pub fn fill_balloon(&self, mib: u64) -> Result<(u64, u64)> {
        let output = self.process.stdout();
        let mark = output.mark();
        self.godwit("balloon", &[&format!("{mib}M")])?.expect_code(0)?;
        output.wait("the balloon to be so large", mark, PATIENCE, |line| {
            let balloon = GuestEvent::named(line, "balloon")?;
            let number = |name| balloon.number(name).ok();
            (number("pages")? == mib << 8).then_some((number("taken")?, number("zero")?))
        })
    }

    /// Waits until its process ends with status 0.
    pub fn wait_success(&mut self, patience: impl Into<WaitLimit>) -> Result<()> {
        self.process.wait_success(patience)
    }
}

impl Migration {
    /// From the command that ended.
    pub fn of(finished: Finished) -> Result<Self> {
        let report = match finished.stdout.trim() {
            "" => None,
            text => {
                Some(serde_json::from_str(text).with_context(|| format!("expected a report, got {text:?}"))?)
            }
        };
        Ok(Self {
            code: finished.code,
            report,
            stderr: finished.stderr,
        })
    }

    /// The report of a guest that moved; fails if it did not, or if the report contradicts itself.
    pub fn moved(self) -> Result<Report> {
        ensure!(
            self.code == Some(0),
            "expected a move, got exit code {:?}: {}",
            self.code,
            self.stderr
        );
        let report = self.report.context("moved without a report")?;
        ensure!(
            report.outcome == Outcome::Moved && report.error.is_none(),
            "expected a move, got {report:?}"
        );
        let terms = &report.downtime;
        let sum = terms.pause_ms
            + terms.drain_ms
            + terms.final_log_ms
            + terms.final_copy_ms
            + terms.state_ms
            + terms.restore_ms
            + terms.commit_ms
            + terms.resume_ms;
        let downtime = report.downtime_ms.context("moved without a downtime")?;
        ensure!(
            (sum - downtime).abs() < 0.01,
            "the terms add up to {sum} ms, the downtime is {downtime} ms"
        );
        ensure!(
            report.budget_kept == (downtime <= report.budget_ms),
            "budget_kept is wrong in {report:?}"
        );
        if let Some(digest) = &report.memory_digest {
            ensure!(digest.source == digest.destination, "digests differ: {digest:?}");
        }
        Ok(report)
    }

    /// The line on stderr about a guest that stayed; fails if it did not, or if no reason was given.
    pub fn stayed(self, outcome: Outcome) -> Result<String> {
        ensure!(
            self.code == Some(1),
            "expected exit code 1, got {:?}: {}",
            self.code,
            self.stderr
        );
        let report = self.report.context("no report")?;
        ensure!(report.outcome == outcome, "expected {outcome:?}, got {report:?}");
        let error = report.error.context("no reason in the report")?;
        let line = self.stderr.trim_end();
        ensure!(
            line.ends_with(&error) && !line.contains('\n'),
            "expected one line with {error:?}, got {line:?}"
        );
        Ok(line.to_owned())
    }
}
