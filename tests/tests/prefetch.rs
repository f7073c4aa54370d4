//! Guests that run from a snapshot while their memory is being read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tests::{BareGuest, Journey, PATIENCE, ReservedHugePages, TestHost, TestProcess, Tick, Vm, wait_until};

const GUEST: BareGuest = BareGuest {
    memory_mib: 256,
    cpus: 2,
    workset: "128M",
    rate: "max",
    ..BareGuest::DEFAULT
};

/// A guest in files, and where.
fn in_files(guest: &BareGuest<'_>, options: &[&str]) -> Result<(Journey, PathBuf)> {
    let journey = Journey::start(TestHost::new()?, guest, options)?;
    let directory = journey.host.path("saved");
    journey.vm.snapshot(&directory, &[])?;
    Ok((journey, directory))
}

/// Goes on with it.
fn go_on(journey: &mut Journey, directory: &Path) -> Result<()> {
    let restored = journey.host.restore(directory, &["--prefetch", "--resume"])?;
    journey.arrive(restored)
}

/// Waits until all of its memory is there.
fn wait_all_here(vm: &Vm) -> Result<()> {
    wait_until("all of the memory to be there", || {
        Ok(vm.status()?["prefetch"].is_null())
    })
}

#[test]
fn a_guest_runs_while_its_memory_comes_and_needs_no_file_afterwards() -> Result<()> {
    let (mut journey, directory) = in_files(&GUEST, &[])?;
    go_on(&mut journey, &directory)?;
    journey.vm.check_running()?;
    wait_all_here(&journey.vm)?;
    File::options()
        .write(true)
        .open(directory.join("memory"))?
        .set_len(0)?;
    std::fs::remove_dir_all(&directory)?;
    journey.verify()?;
    journey.hop(&["--verify"])?;
    journey.verify()?;
    journey.check_life()?;
    journey.end()
}

/// Of which it takes a while to read the memory.
const LARGE: BareGuest = BareGuest {
    memory_mib: 1024,
    ..GUEST
};

/// Goes on with it, and makes sure that not all of its memory is there yet.
fn go_on_early(journey: &mut Journey, directory: &Path) -> Result<()> {
    go_on(journey, directory)?;
    let status = journey.vm.status()?;
    ensure!(
        status["prefetch"].is_object(),
        "all of it is there already: {status}"
    );
    Ok(())
}

#[test]
fn a_guest_moves_while_its_memory_comes() -> Result<()> {
    let (mut journey, directory) = in_files(&LARGE, &[])?;
    go_on_early(&mut journey, &directory)?;
    journey.hop(&["--verify"])?;
    journey.verify()?;
    journey.end()
}

#[test]
fn a_guest_is_put_in_files_while_its_memory_comes() -> Result<()> {
    let (mut journey, directory) = in_files(&LARGE, &[])?;
    go_on_early(&mut journey, &directory)?;
    let again = journey.host.path("again");
    journey.vm.snapshot(&again, &["--keep-running"])?;
    journey.verify()?;
    // What had not come by then is in those files as well.
    let mut other = journey.host.restore(&again, &["--resume", "--preload"])?;
    other.check_running()?;
    other.godwit("stop", &["--force"])?.expect_code(0)?;
    other.wait_success(PATIENCE)?;
    journey.end()
}

#[test]
fn a_guest_that_waits_to_be_resumed_gets_its_memory_as_well() -> Result<()> {
    let (mut journey, directory) = in_files(&GUEST, &[])?;
    let restored = journey.host.restore(&directory, &["--prefetch"])?;
    journey.arrive(restored)?;
    wait_all_here(&journey.vm)?;
    journey.vm.godwit("resume", &[])?.expect_code(0)?;
    journey.vm.check_running()?;
    journey.verify()?;
    journey.end()
}

#[test]
fn what_the_balloon_gives_up_meanwhile_is_zero() -> Result<()> {
    const MIB: u64 = 32;
    const PAGES: u64 = MIB << 8;
    let guest = BareGuest { cpus: 1, ..GUEST };
    let (mut journey, directory) = in_files(&guest, &["--balloon"])?;
    go_on(&mut journey, &directory)?;
    journey.vm.fill_balloon(MIB)?;
    wait_all_here(&journey.vm)?;
    let taken = journey.vm.fill_balloon(0)?;
    ensure!(
        taken == (PAGES, PAGES),
        "expected {PAGES} pages of zeroes, got {taken:?}"
    );
    journey.verify()?;
    journey.hop(&["--verify"])?;
    journey.verify()?;
    journey.end()
}

#[test]
fn huge_pages_come_as_well() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 64,
        workset: "32M",
        ..GUEST
    };
    let _pages = ReservedHugePages::set_aside(128)?;
    let (mut journey, directory) = in_files(&guest, &["--huge-pages"])?;
    go_on(&mut journey, &directory)?;
    journey.vm.check_running()?;
    wait_all_here(&journey.vm)?;
    journey.verify()?;
    journey.hop(&["--verify"])?;
    journey.end()
}

#[test]
fn memory_that_processes_share_is_read_as_a_whole() -> Result<()> {
    let (mut journey, directory) = in_files(&GUEST, &["--shared-memory"])?;
    go_on(&mut journey, &directory)?;
    ensure!(journey.vm.status()?["prefetch"].is_null());
    journey.verify()?;
    journey.end()
}

#[test]
fn damaged_memory_ends_the_guest_before_it_sees_it() -> Result<()> {
    let (journey, directory) = in_files(&GUEST, &[])?;
    let Journey { host, .. } = journey;
    let memory = File::options()
        .read(true)
        .write(true)
        .open(directory.join("memory"))?;
    // Late in it, in what the guest writes and compares all the time.
    let at = (GUEST.memory_mib << 20) - (1 << 20);
    let mut byte = [0];
    memory.read_exact_at(&mut byte, at)?;
    memory.write_all_at(&[byte[0] ^ 1], at)?;
    let words = directory.display().to_string();
    let command = host.command(["restore", &words, "--name", "web", "--prefetch", "--resume"]);
    let finished = TestProcess::run(command, PATIENCE)?;
    finished.expect_code(1)?;
    for word in [
        "the guest cannot go on without the rest of its memory",
        "the file is damaged",
        &words,
    ] {
        ensure!(
            finished.stderr.contains(word),
            "expected {word:?}, got {finished:?}"
        );
    }
    let wrong = finished
        .stdout
        .lines()
        .filter_map(Tick::parse)
        .find(|tick| tick.errors > 0);
    ensure!(wrong.is_none(), "the guest saw something else than its memory");
    host.check_clean()
}

#[test]
fn a_vm_ends_in_order_while_its_memory_comes() -> Result<()> {
    let (journey, directory) = in_files(&LARGE, &[])?;
    let Journey { host, .. } = journey;
    for _ in 0..5 {
        let mut vm = host.restore(&directory, &["--prefetch", "--resume"])?;
        ensure!(vm.status()?["prefetch"].is_object(), "all of it is there already");
        vm.godwit("stop", &["--force"])?.expect_code(0)?;
        vm.wait_success(PATIENCE).context("a VM that was stopped")?;
        host.check_clean()?;
    }
    Ok(())
}
