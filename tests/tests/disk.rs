//! A guest that reads from its disk all the time, moved while it does, with its disk or without.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use fault_proxy::{Direction, FaultPlan, FaultPoint, Proxy, ProxyConnection, ProxyFault, When};
use migration::Outcome;
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::process::Signal;
use tests::{BareGuest, Journey, PATIENCE, TestHost, count, wait_until};

const DISK_BYTES: u64 = 64 << 20;
/// Reads after each move: the disk is read once in the mean.
const READS: u64 = DISK_BYTES >> 12;

#[test]
fn no_read_is_wrong_or_lost_across_moves() -> Result<()> {
    let host = TestHost::new()?;
    let path = host.path("disk.img");
    fs::File::create(&path)?.set_len(DISK_BYTES)?;
    let guest = BareGuest {
        reads: 32,
        ..Default::default()
    };
    let disk = format!("id=d,path={}", path.display());
    let mut journey = Journey::start(host, &guest, &["--disk", &disk])?;
    let mut reads = journey.vm.read_on(READS)?.reads;
    let disk = format!("d={}", path.display());
    for number in 1..=count(4)? {
        let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--disk", &disk])?;
        let moved = journey.hop_to(receiver, &endpoint, &["--verify", "--on-miss", "switch"]);
        moved.with_context(|| format!("move {number}"))?;
        let before = reads;
        reads = journey.vm.read_on(READS)?.reads;
        ensure!(
            reads >= before + READS,
            "the guest had read {before} pages, and has read {reads} after move {number}"
        );
    }
    journey.verify()?;
    // Every error of the guest's life is found there: a status, a page in another's place, a page that came later
    // than its completion.
    journey.end()
}

/// A guest whose disk, stamped by itself, is in a folder of its own, and another folder.
fn with_a_disk_here() -> Result<(Journey, std::path::PathBuf, std::path::PathBuf)> {
    let host = TestHost::new()?;
    let (here, there) = (host.path("here"), host.path("there"));
    fs::create_dir(&here)?;
    fs::create_dir(&there)?;
    let path = here.join("disk");
    fs::File::create(&path)?.set_len(DISK_BYTES)?;
    let guest = BareGuest {
        reads: 32,
        ..Default::default()
    };
    let disk = format!("id=d,path={}", path.display());
    let journey = Journey::start(host, &guest, &["--disk", &disk])?;
    journey.vm.read_on(READS)?;
    Ok((journey, path, there))
}

fn entries(folder: &Path) -> Result<Vec<String>> {
    let name = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    fs::read_dir(folder)?.map(name).collect()
}

#[test]
fn a_disk_comes_along() -> Result<()> {
    let (mut journey, here, there) = with_a_disk_here()?;
    let mut left = here;
    // The disk goes there, and back to a file beside the old one.
    for path in [there.join("disk"), left.with_file_name("back")] {
        let disk = format!("d={}", path.display());
        let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--disk", &disk])?;
        let arguments = ["--with-disks", "--verify", "--on-miss", "switch"];
        let report = journey.hop_to(receiver, &endpoint, &arguments)?;
        ensure!(
            report.disks == 1 && report.disk_bytes >= DISK_BYTES / 2 && report.mirror_ms > 0.0,
            "no disk in {report:?}"
        );
        journey.vm.read_on(READS)?;
        ensure!(fs::read(&left)? == fs::read(&path)?, "the disks differ");
        // The old file is not read any more.
        fs::remove_file(&left)?;
        left = path;
    }
    ensure!(entries(&there)?.is_empty(), "left behind: {:?}", entries(&there)?);
    journey.verify()?;
    journey.end()
}

#[test]
fn a_file_that_is_not_the_sources_disk_is_refused() -> Result<()> {
    let (mut journey, here, there) = with_a_disk_here()?;
    let there = there.join("disk");
    let disk = |path: &Path| format!("d={}", path.display());
    let refused = |journey: &Journey, endpoint: &str, arguments: &[&str]| -> Result<()> {
        let line = journey.vm.migrate(endpoint, arguments)?.stayed(Outcome::Failed)?;
        ensure!(
            line.contains("without the source's lock") && line.contains("shared=on"),
            "{line}"
        );
        journey.vm.check_running().map(drop)
    };
    // Of the right size, and even with the right content, but not the file that the guest uses.
    fs::copy(&here, &there)?;
    let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--disk", &disk(&there)])?;
    refused(&journey, &endpoint, &[])?;
    refused(&journey, &endpoint, &["--with-disks"])?;
    fs::remove_file(&there)?;
    let come = ["--with-disks", "--verify", "--on-miss", "switch"];
    let report = journey.hop_to(receiver, &endpoint, &come)?;
    ensure!(report.disks == 1, "no disk in {report:?}");

    // The file that the guest left is older than the one that it has.
    let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--disk", &disk(&here)])?;
    refused(&journey, &endpoint, &come)?;
    drop(receiver);
    // This guest has written nothing meanwhile, and its operator knows that.
    let word = format!("{},shared=on", disk(&here));
    let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--disk", &word])?;
    let report = journey.hop_to(receiver, &endpoint, &come)?;
    ensure!(report.disks == 0, "a disk came along: {report:?}");
    journey.vm.read_on(READS)?;
    journey.verify()?;
    // A receiver that was killed left its socket.
    let life = journey.check_life();
    drop(journey);
    life.map(drop)
}

/// Has another process lock the disk at `path` when the destination is about to.
fn locked_at_go(path: &Path, held: Arc<Mutex<Option<fs::File>>>) -> FaultPlan {
    let path = path.to_owned();
    let lock = move || {
        // The destination's error shows whether that worked.
        let file = fs::File::options().write(true).open(path).ok();
        let locked = file.filter(|file| fcntl_lock(file, FlockOperation::NonBlockingLockExclusive).is_ok());
        if let Ok(mut held) = held.lock() {
            *held = locked;
        }
    };
    FaultPlan {
        point: FaultPoint {
            connection: ProxyConnection::Control,
            direction: Direction::ToDestination,
            message: "go".into(),
            occurrence: 0,
        },
        fault: ProxyFault::Call(When::Before, Box::new(lock)),
    }
}

#[test]
fn a_disk_goes_with_the_copy_of_its_guest_that_is_thrown_away() -> Result<()> {
    let (mut journey, here, there) = with_a_disk_here()?;
    let path = there.join("disk");
    let disk = format!("d={}", path.display());
    let (mut receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--disk", &disk])?;
    let held = Arc::new(Mutex::new(None));
    let plans = vec![locked_at_go(&path, held.clone())];
    let proxy = Proxy::start(&"tcp:127.0.0.1:0".parse()?, &endpoint.parse()?, plans)?;
    let arguments = ["--with-disks", "--on-miss", "switch"];
    let migration = journey.vm.migrate(&proxy.address().to_string(), &arguments)?;
    ensure!(migration.code == Some(3), "{migration:?}");
    let status = receiver.status()?;
    ensure!(status.to_string().contains("has it locked"), "{status}");
    ensure!(path.exists(), "the disk of a guest that may run yet is gone");
    receiver.godwit("resolve", &["--discard"])?.expect_code(0)?;
    receiver.wait_success(PATIENCE)?;
    ensure!(entries(&there)?.is_empty(), "left behind: {:?}", entries(&there)?);
    drop(held);
    journey.vm.godwit("resolve", &["--run"])?.expect_code(0)?;
    journey.vm.read_on(READS)?;
    ensure!(here.exists(), "the only disk is gone");
    journey.verify()?;
    journey.end()
}

#[test]
fn a_disk_that_does_not_arrive_leaves_nothing() -> Result<()> {
    let (mut journey, here, there) = with_a_disk_here()?;
    let disk = format!("d={}", there.join("disk").display());
    let nothing = || Ok(entries(&there)?.is_empty());

    // The receiver does not name it: refused before the guest is touched.
    let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--disk", &disk])?;
    let line = journey.vm.migrate(&endpoint, &[])?.stayed(Outcome::Failed)?;
    ensure!(line.contains("found nothing there"), "{line}");
    drop(receiver);

    let slowly = ["--with-disks", "--bandwidth", "2MB/s"];
    let mirrors = |journey: &Journey| Ok(journey.vm.status()?["migration"]["phase"] == "mirror");
    let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--disk", &disk])?;
    let mut migration = journey.vm.start_migration(&endpoint, &slowly)?;
    wait_until("the disk's turn", || mirrors(&journey))?;
    ensure!(!nothing()?, "no disk is made");
    journey.vm.godwit("cancel", &[])?.expect_code(0)?;
    migration.wait(PATIENCE)?;
    wait_until("the disk to go", nothing)?;
    journey.vm.read_on(READS)?;
    drop(receiver);

    // No process is left to remove it; it has another name than the disk.
    let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--disk", &disk])?;
    let mut migration = journey.vm.start_migration(&endpoint, &slowly)?;
    wait_until("the disk's turn", || mirrors(&journey))?;
    receiver.process.signal(Signal::KILL)?;
    migration.wait(PATIENCE)?;
    for name in entries(&there)? {
        ensure!(name.starts_with(".disk."), "left behind: {name}");
        fs::remove_file(there.join(name))?;
    }

    // The destination's file system is full: `migrate` says so, and the guest reads on.
    let full = "d=/dev/full/disk";
    let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--disk", full])?;
    let line = journey
        .vm
        .migrate(&endpoint, &["--with-disks"])?
        .stayed(Outcome::Failed)?;
    ensure!(line.contains("/dev/full/disk"), "{line}");
    drop(receiver);
    journey.vm.read_on(READS)?;
    ensure!(here.exists(), "the only disk is gone");
    journey.verify()?;
    // The receivers that were killed left their sockets.
    let life = journey.check_life();
    drop(journey);
    life.map(drop)
}
