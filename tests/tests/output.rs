//! Output whose reader is there, has left, or never came: guests live on, and exit codes say what became of them.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, PipeReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use migration::Outcome;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tests::{
    BareGuest, Elsewhere, GuestEvent, Journey, Migration, OutputSink, PATIENCE, SmallFileSystem, TestHost,
    TestProcess, Vm, wait_until,
};

/// Where nothing listens.
const NOBODY: &str = "tcp:127.0.0.1:1";

/// Starts VMs whose standard error goes into a sink.
struct Starter {
    host: TestHost,
    sink: OutputSink,
    unread: Vec<PipeReader>,
}

impl Starter {
    fn start(&mut self, name: &str, command: Command) -> Result<Vm> {
        let (stderr, kept) = self.sink.open()?;
        let elsewhere = Elsewhere {
            stderr: Some(stderr),
            ..Default::default()
        };
        let vm = self.host.start_to(name, command, elsewhere)?;
        match (self.sink, kept) {
            (OutputSink::Left, Some(reader)) => {
                let mut line = String::new();
                BufReader::new(reader).read_line(&mut line)?;
                ensure!(line.ends_with('\n'), "expected a line from {name}, got {line:?}");
            }
            (_, kept) => self.unread.extend(kept),
        }
        Ok(vm)
    }

    fn boot(&mut self, name: &str) -> Result<Vm> {
        let mut command = self.host.command(["run", "--name", name]);
        command.args(BareGuest::DEFAULT.options(&self.host)?);
        let vm = self.start(name, command)?;
        vm.process.stdout().wait("bare: ready", 0, PATIENCE, |line| {
            GuestEvent::named(line, "ready")
        })?;
        Ok(vm)
    }

    fn receive(&mut self, name: &str) -> Result<(Vm, String)> {
        let path = self.host.path(&format!("{name}.move"));
        let endpoint = format!("unix:{}", path.display());
        let command = self
            .host
            .command(["receive", "--name", name, "--listen", &endpoint]);
        let vm = self.start(name, command)?;
        wait_until("a receiver that listens", || Ok(path.exists()))?;
        Ok((vm, endpoint))
    }

    fn restore(&mut self, name: &str, directory: &Path) -> Result<Vm> {
        let mut command = self.host.command(["restore", "--name", name, "--resume"]);
        command.arg(directory);
        self.start(name, command)
    }

    /// Starts a client that cannot say anything on standard error.
    fn migrate(&mut self, vm: &Vm, endpoint: &str, arguments: &[&str]) -> Result<TestProcess> {
        let (stderr, kept) = self.sink.open()?;
        // The client prints nothing before its end; a reader that leaves has left by then.
        if self.sink != OutputSink::Left {
            self.unread.extend(kept);
        }
        let elsewhere = Elsewhere {
            stderr: Some(stderr),
            ..Default::default()
        };
        vm.start_migration_to(endpoint, arguments, elsewhere)
    }

    /// Moves the guest by such a client.
    fn hop(&mut self, journey: &mut Journey, name: &str) -> Result<()> {
        let (receiver, endpoint) = self.receive(name)?;
        let client = self.migrate(&journey.vm, &endpoint, &["--verify"])?;
        Migration::of(client.finish(PATIENCE)?)?.moved()?;
        journey.arrive(receiver)?;
        journey.vm.check_running()?;
        Ok(())
    }
}

/// A move that fails ends at once, with the right exit code, also where its client cannot print the reason.
fn fail_to_move(starter: &mut Starter, vm: &Vm) -> Result<()> {
    let client = starter.migrate(vm, NOBODY, &[])?;
    client.finish(PATIENCE)?.expect_code(1)?;
    vm.godwit("pause", &[])?.expect_code(0)?;
    vm.godwit("resume", &[])?.expect_code(0)?;
    vm.check_running()?;
    Ok(())
}

/// `run`, `receive`, `restore` and `migrate` with standard error in a sink: the guest moves, fails to move, goes
/// through files, moves again, and ends.
fn a_life_with_stderr_in(sink: OutputSink) -> Result<()> {
    let host = TestHost::new()?;
    let mut starter = Starter {
        host: host.clone(),
        sink,
        unread: Vec::new(),
    };
    let vm = starter.boot("vm-0")?;
    let mut journey = Journey::of(host, vm);
    fail_to_move(&mut starter, &journey.vm)?;
    starter.hop(&mut journey, "vm-1").context("after `run`")?;
    fail_to_move(&mut starter, &journey.vm)?;
    starter.hop(&mut journey, "vm-2").context("after `receive`")?;
    let saved = journey.host.path("saved");
    journey.vm.snapshot(&saved, &[])?;
    let restored = starter.restore("vm-3", &saved)?;
    journey.arrive(restored)?;
    journey.vm.check_running()?;
    fail_to_move(&mut starter, &journey.vm)?;
    starter.hop(&mut journey, "vm-4").context("after `restore`")?;
    journey.verify()?;
    journey.end()
}

#[test]
fn standard_error_without_room() -> Result<()> {
    a_life_with_stderr_in(OutputSink::Full)
}

#[test]
fn standard_error_whose_reader_leaves_after_a_line() -> Result<()> {
    a_life_with_stderr_in(OutputSink::Left)
}

#[test]
fn standard_error_that_is_full_and_never_read() -> Result<()> {
    a_life_with_stderr_in(OutputSink::Stuck)
}

/// The same for standard output. What the guest says there is lost; the processes between which it is moved receive it.
#[test]
fn standard_output_that_nobody_reads() -> Result<()> {
    for sink in [OutputSink::Full, OutputSink::Left, OutputSink::Stuck] {
        let host = TestHost::new()?;
        let mut unread = Vec::new();
        let mut elsewhere = || -> Result<Elsewhere> {
            let (stdout, kept) = sink.open()?;
            if sink != OutputSink::Left {
                unread.extend(kept);
            }
            Ok(Elsewhere {
                stdout: Some(stdout),
                ..Default::default()
            })
        };
        let mut command = host.command(["run", "--name", "vm-0"]);
        command.args(BareGuest::DEFAULT.options(&host)?);
        let vm = host.start_to("vm-0", command, elsewhere()?)?;
        wait_until("a VM that runs", || Ok(vm.godwit("status", &[])?.code == Some(0)))?;
        let mut journey = Journey::of(host.clone(), vm);
        let (receiver, endpoint) = journey.receiver("tcp:127.0.0.1:0")?;
        let client = journey.vm.start_migration_to(&endpoint, &[], elsewhere()?)?;
        client.finish(PATIENCE)?.expect_code(0)?;
        journey.arrive(receiver)?;
        let path = host.path("unread.move");
        let endpoint = format!("unix:{}", path.display());
        let command = host.command(["receive", "--name", "unread", "--listen", &endpoint]);
        let no_reader = host.start_to("unread", command, elsewhere()?)?;
        wait_until("a receiver that listens", || Ok(path.exists()))?;
        journey.vm.check_running()?;
        journey.vm.migrate(&endpoint, &[])?.moved()?;
        journey.vm.wait_success(PATIENCE)?;
        let (last, endpoint) = host.receive("last", "tcp:127.0.0.1:0", Vec::<&str>::new())?;
        no_reader.migrate(&endpoint, &["--verify"])?.moved()?;
        last.check_running()?;
        last.godwit("stop", &["--force"])?.expect_code(0)?;
    }
    Ok(())
}

/// A whole life with `--log` at a path.
fn a_life_with_log(host: TestHost, log: &Path, vm: Vm) -> Result<Journey> {
    let mut journey = Journey::of(host.clone(), vm);
    let option = ["--log", log.to_str().context("a path")?];
    journey.vm.migrate(NOBODY, &[])?.stayed(Outcome::Failed)?;
    journey.vm.check_running()?;
    let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &option)?;
    journey.hop_to(receiver, &endpoint, &["--verify"])?;
    let saved = host.path("saved");
    journey.vm.snapshot(&saved, &[])?;
    let restored = host.restore(&saved, &[&["--resume"], &option[..]].concat())?;
    journey.arrive(restored)?;
    let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &option)?;
    journey.hop_to(receiver, &endpoint, &["--verify"])?;
    journey.vm.check_running()?;
    Ok(journey)
}

fn boot_with_log(host: &TestHost, log: &Path) -> Result<Vm> {
    BareGuest::DEFAULT.boot(host, "vm-0", &["--log", log.to_str().context("a path")?])
}

/// No reader has it open; the start does not wait for one.
#[test]
fn a_log_in_a_fifo_without_a_reader() -> Result<()> {
    let host = TestHost::new()?;
    let fifo = host.path("log");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    let vm = boot_with_log(&host, &fifo)?;
    let journey = a_life_with_log(host, &fifo, vm)?;
    // A reader that comes later gets what the pipe had room for.
    let mut line = String::new();
    BufReader::new(File::options().read(true).write(true).open(&fifo)?).read_line(&mut line)?;
    ensure!(!line.is_empty(), "a reader that came late was told nothing");
    journey.end()
}

#[test]
fn a_log_on_a_full_file_system() -> Result<()> {
    let host = TestHost::new()?;
    let small = SmallFileSystem::mount(host.path("small"), 1)?;
    let log = small.path().join("log");
    let filler = fill(small.path())?;
    let vm = boot_with_log(&host, &log)?;
    let journey = a_life_with_log(host, &log, vm)?;
    fs::remove_file(filler)?;
    journey.vm.migrate(NOBODY, &[])?.stayed(Outcome::Failed)?;
    wait_until("what was lost to be told", || {
        Ok(fs::read_to_string(&log)?.contains("log lines were lost"))
    })?;
    let mode = fs::metadata(&log)?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "the log's mode is {mode:o}");
    journey.end()
}

/// A file that fills the file system.
fn fill(directory: &Path) -> Result<PathBuf> {
    let path = directory.join("filler");
    let mut file = File::create(&path)?;
    while io::Write::write(&mut file, &[0; 4096]).is_ok() {}
    Ok(path)
}

/// Connections a second, and for how long: as a scanner of ports makes them.
const SCANS: u32 = 3000;

/// A receiver at a port that a scanner connects to writes few lines, counts the rest, and takes a guest all the same.
#[test]
fn a_port_scanner_leaves_few_lines() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let (receiver, endpoint) = journey.receiver("tcp:127.0.0.1:0")?;
    let address = endpoint.strip_prefix("tcp:").context("an address")?;
    let began = Instant::now();
    for _ in 0..SCANS {
        // Those that there is no room for are refused, as for any scanner.
        let _ = std::net::TcpStream::connect(address);
    }
    let news = |line: &str| line.contains("log lines were left out").then_some(());
    receiver
        .process
        .stderr()
        .wait("what was left out", 0, PATIENCE, news)?;
    journey.hop_to(receiver, &endpoint, &["--verify"])?;
    journey.vm.check_running()?;
    let lines = journey.vm.process.stderr().text().lines().count() as u64;
    // Two kinds of lines: a hundred of each at once, then ten a second, and one a second on those left out.
    let most = 2 * 100 + (began.elapsed() + Duration::from_secs(2)).as_secs() * (2 * 10 + 1) + 20;
    ensure!(lines <= most, "{lines} lines, expected at most {most}");
    journey.end()
}
