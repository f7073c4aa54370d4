//! Guests whose pages come from another process, and what becomes of them when that process has gone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tests::{
    BareGuest, Finished, Image, Journey, PATIENCE, ReservedHugePages, TestHost, TestProcess, Tick, Vm,
    wait_until,
};

/// So soon a guest is paused though no handler fills the page that it waits for.
const SOON: Duration = Duration::from_secs(2);

const GUEST: BareGuest = BareGuest {
    memory_mib: 96,
    cpus: 2,
    workset: "32M",
    rate: "50M",
    ..BareGuest::DEFAULT
};

/// A handler that listens, and where.
struct HandlerProcess {
    process: TestProcess,
    socket: String,
}

impl HandlerProcess {
    fn start(host: &TestHost, memory: &Path, name: &str) -> Result<Self> {
        let socket = host.path(name).display().to_string();
        let mut command = Command::new(env!("CARGO_BIN_EXE_fault-handler"));
        command.arg(memory).arg(&socket);
        let process = TestProcess::spawn(command)?;
        let listens = |line: &str| (line == "listening").then_some(());
        process
            .stdout()
            .wait("the handler to listen", 0, PATIENCE, listens)?;
        Ok(Self { process, socket })
    }

    /// How many pages it filled. It ends when its machine does.
    fn filled(self) -> Result<u64> {
        Ok(self.ended()?.0)
    }

    /// The same, and how many were given up.
    fn ended(self) -> Result<(u64, u64)> {
        let finished = self.process.finish(PATIENCE)?;
        let said = &finished.expect_code(0)?.stdout;
        let numbers = |line: &str| {
            let (filled, given_up) = line.strip_prefix("filled ")?.split_once(", given up ")?;
            Some((filled.parse().ok()?, given_up.parse().ok()?))
        };
        said.lines()
            .find_map(numbers)
            .with_context(|| format!("got {said:?}"))
    }
}

/// A guest that lies in files; its memory is not where the rest of them is.
fn in_files(guest: &BareGuest<'_>, options: &[&str]) -> Result<(Journey, PathBuf, PathBuf)> {
    put_in_files(Journey::start(TestHost::new()?, guest, options)?)
}

/// Puts a guest there.
fn put_in_files(journey: Journey) -> Result<(Journey, PathBuf, PathBuf)> {
    let (directory, memory) = (journey.host.path("saved"), journey.host.path("memory-elsewhere"));
    journey.vm.snapshot(&directory, &[])?;
    std::fs::rename(directory.join("memory"), &memory)?;
    Ok((journey, directory, memory))
}

/// Goes on with it, and with a handler that fills its pages.
fn handled(
    mut journey: Journey,
    directory: &Path,
    memory: &Path,
    options: &[&str],
) -> Result<(Journey, HandlerProcess)> {
    let handler = HandlerProcess::start(&journey.host, memory, "handler")?;
    let options = [options, &["--uffd", &handler.socket]].concat();
    let restored = journey.host.restore(directory, &options)?;
    journey.arrive(restored)?;
    Ok((journey, handler))
}

#[test]
fn a_guest_whose_pages_come_one_by_one() -> Result<()> {
    let (journey, directory, memory) = in_files(&GUEST, &[])?;
    let (mut journey, handler) = handled(journey, &directory, &memory, &["--resume"])?;
    journey.vm.check_running()?;
    // Every page of it, whether it came by then or not, is in the next snapshot, and moves.
    let again = journey.host.path("again");
    journey.vm.snapshot(&again, &["--keep-running"])?;
    journey.vm.check_running()?;
    journey.hop(&["--verify"])?;
    journey.verify()?;
    journey.check_life()?;
    let pages = GUEST.memory_mib << 8;
    let filled = handler.filled()?;
    ensure!(
        filled == pages,
        "expected each of {pages} pages once, got {filled}"
    );
    let mut other = journey.host.restore(&again, &["--resume", "--preload"])?;
    other.check_running()?;
    other.godwit("stop", &["--force"])?.expect_code(0)?;
    other.wait_success(PATIENCE)?;
    journey.end()
}

#[test]
fn pages_that_were_given_up_do_not_come_back() -> Result<()> {
    const MIB: u64 = 32;
    const PAGES: u64 = MIB << 8;
    let guest = BareGuest { cpus: 1, ..GUEST };
    let (journey, directory, memory) = in_files(&guest, &["--balloon"])?;
    let (mut journey, handler) = handled(journey, &directory, &memory, &["--resume"])?;
    // The snapshot has something else in them. First they have never come, then they all have.
    journey.vm.fill_balloon(MIB)?;
    let taken = journey.vm.fill_balloon(0)?;
    ensure!(
        taken == (PAGES, PAGES),
        "expected {PAGES} pages of zeroes, got {taken:?}"
    );
    journey.verify()?;
    journey.vm.fill_balloon(MIB)?;
    journey.verify()?;
    // A move reads all of memory.
    journey.hop(&["--verify"])?;
    let taken = journey.vm.fill_balloon(0)?;
    ensure!(
        taken == (2 * PAGES, 2 * PAGES),
        "expected {PAGES} more pages of zeroes, got {taken:?}"
    );
    let verified = journey.verify()?;
    ensure!(
        verified > 2 * PAGES,
        "expected all of memory, got {verified} pages"
    );
    let (filled, given_up) = handler.ended()?;
    ensure!(
        given_up == 2 * PAGES && filled >= 2 * PAGES,
        "filled {filled} pages, {given_up} were given up"
    );
    journey.end()
}

#[test]
fn what_is_given_up_of_a_mapped_snapshot_is_zero() -> Result<()> {
    const MIB: u64 = 32;
    const PAGES: u64 = MIB << 8;
    let guest = BareGuest { cpus: 1, ..GUEST };
    let mut journey = Journey::start(TestHost::new()?, &guest, &["--balloon"])?;
    let [base, difference, whole] = ["base", "difference", "whole"].map(|name| journey.host.path(name));
    journey.vm.snapshot(&base, &[])?;
    let restored = journey.host.restore(&base, &["--resume"])?;
    journey.arrive(restored)?;
    // The snapshot's file, which its memory is mapped from, has something else in them.
    journey.vm.fill_balloon(MIB)?;
    let taken = journey.vm.fill_balloon(0)?;
    ensure!(
        taken == (PAGES, PAGES),
        "expected {PAGES} pages of zeroes, got {taken:?}"
    );
    journey.verify()?;
    // Pages that are zero now are part of the difference to it, though nothing was written there.
    journey.vm.fill_balloon(MIB)?;
    journey.vm.snapshot(&difference, &["--diff"])?;
    let words = [&base, &difference, &whole].map(|path| path.display().to_string());
    let merge = ["snapshot", "merge", &words[0], &words[1], "--output", &words[2]];
    TestProcess::run(journey.host.command(merge), PATIENCE)?.expect_code(0)?;
    let restored = journey.host.restore(&whole, &["--resume"])?;
    journey.arrive(restored)?;
    let taken = journey.vm.fill_balloon(0)?;
    ensure!(
        taken == (2 * PAGES, 2 * PAGES),
        "expected {PAGES} more pages of zeroes, got {taken:?}"
    );
    // And it moves.
    journey.vm.fill_balloon(MIB)?;
    journey.hop(&["--verify"])?;
    let taken = journey.vm.fill_balloon(0)?;
    ensure!(
        taken == (3 * PAGES, 3 * PAGES),
        "expected {PAGES} more pages of zeroes, got {taken:?}"
    );
    journey.verify()?;
    journey.end()
}

#[test]
fn a_handler_that_reads_no_events_holds_up_the_balloon_alone() -> Result<()> {
    let guest = BareGuest { cpus: 1, ..GUEST };
    let (journey, directory, memory) = in_files(&guest, &["--balloon"])?;
    let (mut journey, handler) = handled(journey, &directory, &memory, &["--resume"])?;
    // Every page of the guest is there afterwards: its vCPU waits for none.
    journey
        .vm
        .snapshot(&journey.host.path("again"), &["--keep-running"])?;
    handler.process.signal(Signal::STOP)?;
    journey.vm.godwit("balloon", &["32M"])?.expect_code(0)?;
    wait_until("the machine to give up a page", || gives_up(&journey.vm.process))?;
    // A command that has to pause the guest fails in time with the reason. This guest waits for its balloon.
    let directory = journey.host.path("never").display().to_string();
    let refused = journey.vm.godwit("snapshot", &[&directory, "--keep-running"])?;
    refused.expect_code(1)?;
    ensure!(
        refused.stderr.contains("pages that the guest gives up"),
        "got {refused:?}"
    );
    handler.process.signal(Signal::CONT)?;
    journey.vm.check_running()?;
    journey.vm.fill_balloon(0)?;
    journey.verify()?;
    journey.end()
}

#[test]
fn huge_pages_come_whole() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 64,
        ..GUEST
    };
    let _pages = ReservedHugePages::set_aside(128)?;
    let (journey, directory, memory) = in_files(&guest, &["--huge-pages"])?;
    let (mut journey, handler) = handled(journey, &directory, &memory, &["--resume"])?;
    journey.vm.check_running()?;
    journey.verify()?;
    journey.end()?;
    let filled = handler.filled()?;
    ensure!(
        filled == guest.memory_mib / 2,
        "expected each page of 2 MiB once, got {filled}"
    );
    Ok(())
}

#[test]
fn a_guest_that_moves_before_any_page_has_come() -> Result<()> {
    let (journey, directory, memory) = in_files(&GUEST, &[])?;
    let (mut journey, _handler) = handled(journey, &directory, &memory, &[])?;
    journey.hop(&["--verify"])?;
    journey.vm.godwit("resume", &[])?.expect_code(0)?;
    journey.vm.check_running()?;
    journey.verify()?;
    journey.end()
}

#[test]
fn a_guest_that_waits_for_a_page_is_paused_or_the_pause_fails_with_the_reason() -> Result<()> {
    let (journey, directory, memory) = in_files(&GUEST, &[])?;
    let (mut journey, handler) = handled(journey, &directory, &memory, &["--resume"])?;
    handler.process.signal(Signal::STOP)?;
    wait_stuck(&journey.vm)?;
    let begin = Instant::now();
    let pause = TestProcess::spawn(journey.host.command(["pause", &journey.vm.name]))?;
    // Other requests are answered meanwhile.
    while waits(&pause)? {
        let asked = Instant::now();
        journey.vm.status()?;
        ensure!(asked.elapsed() < SOON, "answered after {:?}", asked.elapsed());
    }
    let paused = pause.finish(PATIENCE)?;
    // A signal does not end every wait for a page: where KVM itself reads the guest's memory, the page has to come.
    let refused = paused.code == Some(1)
        && paused
            .stderr
            .contains("does not come from the page-fault handler");
    ensure!(
        refused || (paused.code == Some(0) && begin.elapsed() < SOON),
        "after {:?} got {paused:?}",
        begin.elapsed()
    );
    // A pause that failed holds no vCPU.
    let state = if refused { "Running" } else { "Paused" };
    ensure!(journey.vm.state()? == state, "got {}", journey.vm.status()?);
    handler.process.signal(Signal::CONT)?;
    if refused {
        journey.vm.check_running()?;
    }
    journey.vm.godwit("resume", &[])?.expect_code(0)?;
    journey.vm.check_running()?;
    let begin = Instant::now();
    journey.vm.godwit("pause", &[])?.expect_code(0)?;
    ensure!(begin.elapsed() < SOON, "paused after {:?}", begin.elapsed());
    journey.vm.godwit("resume", &[])?.expect_code(0)?;
    journey.vm.check_running()?;
    journey.verify()?;
    journey.end()
}

/// Whether a command is still under way.
fn waits(command: &TestProcess) -> Result<bool> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", command.id()))?;
    Ok(!status.lines().any(|line| line.starts_with("State:\tZ")))
}

/// Waits until as many threads wait for a page as the guest has vCPUs.
fn wait_stuck(vm: &Vm) -> Result<()> {
    wait_until("the vCPUs to need pages", || {
        Ok(waiting(&vm.process)? >= u64::from(GUEST.cpus))
    })
}

/// How many threads wait for a page of that machine, as the kernel counts them.
fn waiting(machine: &TestProcess) -> Result<u64> {
    let folder = PathBuf::from(format!("/proc/{}", machine.id()));
    for entry in std::fs::read_dir(folder.join("fd"))? {
        let entry = entry?;
        // Others are closed meanwhile.
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        if target != Path::new("anon_inode:[userfaultfd]") {
            continue;
        }
        let text = std::fs::read_to_string(folder.join("fdinfo").join(entry.file_name()))?;
        let total = text.lines().find_map(|line| line.strip_prefix("total:"));
        return Ok(total.with_context(|| format!("got {text:?}"))?.trim().parse()?);
    }
    Ok(0)
}

/// Whether a thread of that machine is giving memory back to the kernel, which takes until the handler has read the
/// event.
fn gives_up(machine: &TestProcess) -> Result<bool> {
    const MADVISE: &str = "28 ";
    for task in std::fs::read_dir(format!("/proc/{}/task", machine.id()))? {
        let call = std::fs::read_to_string(task?.path().join("syscall")).unwrap_or_default();
        if call.starts_with(MADVISE) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A VM that ends by itself, with an error about its handler, and leaves nothing.
fn check_end(host: &TestHost, vm: Vm) -> Result<Finished> {
    let finished = vm.process.finish(PATIENCE)?;
    finished.expect_code(1)?;
    ensure!(
        finished.stderr.contains("the page-fault handler has hung up"),
        "got {finished:?}"
    );
    host.check_clean()?;
    Ok(finished)
}

#[test]
fn a_handler_that_dies_takes_the_guest_with_it() -> Result<()> {
    let (journey, directory, memory) = in_files(&GUEST, &[])?;
    let Journey { host, .. } = journey;
    let start = |name: &str| -> Result<(HandlerProcess, Vm)> {
        let handler = HandlerProcess::start(&host, &memory, name)?;
        let vm = host.restore(&directory, &["--resume", "--uffd", &handler.socket])?;
        Ok((handler, vm))
    };
    // While the guest runs, or waits for a page.
    let (handler, vm) = start("first")?;
    handler.process.signal(Signal::KILL)?;
    check_end(&host, vm)?;
    let (handler, vm) = start("second")?;
    handler.process.signal(Signal::STOP)?;
    wait_stuck(&vm)?;
    handler.process.signal(Signal::KILL)?;
    let said = check_end(&host, vm)?.stdout;
    ensure!(
        said.lines().filter_map(Tick::parse).all(|tick| tick.errors == 0),
        "the guest saw something else than its memory: {said}"
    );
    // While the guest is put in files: the command that waits for that fails.
    let (handler, vm) = start("third")?;
    handler.process.signal(Signal::STOP)?;
    let snapshot = host.path("never").display().to_string();
    let waiting = TestProcess::spawn(host.command(["snapshot", &vm.name, &snapshot]))?;
    wait_until("the snapshot to begin", || {
        Ok(vm.status()?["snapshot"].is_object())
    })?;
    handler.process.signal(Signal::KILL)?;
    check_end(&host, vm)?;
    waiting.finish(PATIENCE)?.expect_code(1)?;
    ensure!(
        !host.path("never").exists(),
        "half a snapshot has the name of one"
    );
    Ok(())
}

#[test]
fn a_handler_that_never_answers() -> Result<()> {
    let (journey, directory, memory) = in_files(&GUEST, &[])?;
    let host = journey.host.clone();
    for signal in [Signal::KILL, Signal::TERM] {
        let handler = HandlerProcess::start(&host, &memory, &format!("{signal:?}"))?;
        handler.process.signal(Signal::STOP)?;
        let mut command = host.command([
            "restore",
            "--name",
            "waits",
            "--resume",
            "--uffd",
            &handler.socket,
        ]);
        command.arg(&directory);
        let vm = TestProcess::spawn(command)?;
        wait_until("the machine to need a page", || Ok(waiting(&vm)? > 0))?;
        if signal == Signal::KILL {
            handler.process.signal(signal)?;
            let finished = vm.finish(PATIENCE)?;
            finished.expect_code(1)?;
            ensure!(
                finished.stderr.contains("the page-fault handler has hung up"),
                "got {finished:?}"
            );
        } else {
            vm.signal(signal)?;
            vm.finish(PATIENCE)?.expect_code(0)?;
        }
        host.check_clean()?;
    }
    Ok(())
}

#[test]
fn what_no_handler_can_do() -> Result<()> {
    for (kind, code, more, word) in [
        (&[][..], 1, &[][..], "No such file"),
        (&[], 2, &["--preload"], "cannot be used with"),
        (&["--shared-memory"], 1, &[], "memory that other processes share"),
    ] {
        let (journey, directory, _) = in_files(&GUEST, kind)?;
        let host = &journey.host;
        let directory = directory.display().to_string();
        let words = [&["restore", &directory, "--uffd", "nobody"], more].concat();
        let refused = TestProcess::run(host.command(words), PATIENCE)?;
        refused.expect_code(code)?;
        ensure!(
            refused.stderr.contains(word),
            "expected {word:?} in {:?}",
            refused.stderr
        );
        host.check_clean()?;
    }
    Ok(())
}

#[test]
fn what_a_clone_has_written_is_in_its_image_at_the_end() -> Result<()> {
    const BYTES: u64 = 4 << 20;
    let guest = BareGuest {
        reads: 32,
        writes: true,
        ..GUEST
    };
    let host = TestHost::new()?;
    let base = host.path("base").display().to_string();
    std::fs::File::create(&base)?.set_len(BYTES)?;
    let journey = Journey::start(host, &guest, &["--disk", &format!("id=d,path={base}")])?;
    // Each page four times in the mean, so each cluster for sure.
    let reads = 4 * (BYTES >> 12);
    journey.vm.read_on(reads)?;
    let (journey, directory, memory) = put_in_files(journey)?;
    let clone = Image::make_on(&journey.host.path("clone"), &base)?;
    let disk = format!("d={},format=qcow2,backing={base}", clone.path());
    let (mut journey, _handler) = handled(journey, &directory, &memory, &["--resume", "--disk", &disk])?;
    journey.vm.read_on(reads)?;
    journey.vm.godwit("stop", &["--force"])?.expect_code(0)?;
    journey.vm.wait_success(PATIENCE)?;
    let known = clone.mapped()?;
    ensure!(known == BYTES, "the image knows {known} bytes of {BYTES}");
    clone.check(false)
}
