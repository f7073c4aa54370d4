//! Disks that fail: the guest gets an I/O error, goes on, and loses nothing.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use migration::Outcome;
use rustix::process::Signal;
use serde_json::Value;
use tests::{BareGuest, Journey, LoopDevice, PATIENCE, SmallFileSystem, TestHost, Vm};

const DISK_BYTES: u64 = 4 << 20;
/// Each page of the disk once in the mean.
const READS: u64 = DISK_BYTES >> 12;
const FAILURES: u64 = 100;
const ANY_PORT: &str = "tcp:127.0.0.1:0";

const READER: BareGuest = BareGuest {
    reads: 32,
    io_errors: true,
    ..BareGuest::DEFAULT
};
const WRITER: BareGuest = BareGuest {
    writes: true,
    ..READER
};

/// Requests that the disk could not serve, as the host counts them.
fn failed(vm: &Vm) -> Result<u64> {
    let finished = vm.godwit("metrics", &["--json"])?;
    let metrics: Value = serde_json::from_str(&finished.expect_code(0)?.stdout)?;
    let failed = metrics["devices"]["d"]["failed"].as_u64();
    failed.with_context(|| format!("no such counter in {metrics}"))
}

/// The host says why requests fail, and not each time.
fn check_log(vm: &Vm, why: &str) -> Result<()> {
    // In this order: requests go on failing.
    let log = vm.process.stderr().text();
    let failed = failed(vm)?;
    let lines = log.lines().filter(|line| line.contains("request failed"));
    let lines: Vec<_> = lines.collect();
    ensure!(
        failed >= FAILURES && (1..=failed.ilog2() + 1).contains(&u32::try_from(lines.len())?),
        "{failed} requests failed, and the log has {} lines: {log}",
        lines.len()
    );
    ensure!(
        lines.iter().all(|line| line.contains(why)),
        "expected {why:?} in {lines:?}"
    );
    Ok(())
}

/// No request fails any more.
fn check_well(vm: &Vm) -> Result<()> {
    // What was in flight has ended by then.
    let before = vm.read_on(READS)?;
    let after = vm.read_on(READS)?;
    ensure!(
        before.io_errors == after.io_errors,
        "requests still fail: {before:?}, {after:?}"
    );
    Ok(())
}

/// What a disk on a file system is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DiskKind {
    Raw,
    Qcow2,
    /// A block device, whose sectors are in a raw image.
    Loop,
}

fn raw(path: &Path) -> Result<()> {
    Ok(File::create(path)?.set_len(DISK_BYTES)?)
}

/// An empty image of version 2: header, reference counts of the four clusters that it has, and where data will be.
fn qcow2(path: &Path) -> Result<()> {
    const CLUSTER_BITS: u32 = 16;
    const CLUSTER: u64 = 1 << CLUSTER_BITS;
    let [counts_table, counts, data_table] = [1, 2, 3].map(|number| number * CLUSTER);
    let file = File::create(path)?;
    let header = [
        &b"QFI\xfb\0\0\0\x02"[..],
        &[0; 12],
        &CLUSTER_BITS.to_be_bytes(),
        &DISK_BYTES.to_be_bytes(),
        &[0, 0, 0, 0, 0, 0, 0, 1],
        &data_table.to_be_bytes(),
        &counts_table.to_be_bytes(),
        &[0, 0, 0, 1],
    ];
    file.write_all_at(&header.concat(), 0)?;
    file.write_all_at(&counts.to_be_bytes(), counts_table)?;
    file.write_all_at(&[0, 1, 0, 1, 0, 1, 0, 1], counts)?;
    Ok(file.set_len(4 * CLUSTER)?)
}

#[test]
fn writes_to_a_full_file_system() -> Result<()> {
    for (kind, run, receive) in [
        (DiskKind::Raw, "", ""),
        (DiskKind::Raw, ",cache=writethrough", ""),
        (DiskKind::Qcow2, ",format=qcow2", ",format=qcow2"),
        (DiskKind::Loop, ",direct=on", ""),
    ] {
        full(kind, run, receive).with_context(|| format!("{kind:?}{run}"))?;
    }
    Ok(())
}

fn full(kind: DiskKind, run: &str, receive: &str) -> Result<()> {
    let host = TestHost::new()?;
    // About half of the disk finds room.
    let small = SmallFileSystem::mount(host.path("small"), 8)?;
    let (image, filler) = (small.path().join("disk"), small.path().join("filler"));
    match kind {
        DiskKind::Qcow2 => qcow2(&image)?,
        DiskKind::Raw | DiskKind::Loop => raw(&image)?,
    }
    fs::write(&filler, vec![1; 6 << 20])?;
    let device = (kind == DiskKind::Loop)
        .then(|| LoopDevice::of(&image))
        .transpose()?;
    let path = device.as_ref().map_or(&*image, LoopDevice::path).display();

    let disk = format!("id=d,path={path}{run}");
    let mut journey = Journey::start(host.clone(), &WRITER, &["--disk", &disk])?;
    journey.vm.fail_on(FAILURES)?;
    // The pages that were written before can be written again.
    journey.vm.read_on(READS)?;
    check_log(&journey.vm, "cannot write to it: No space left on device")?;

    let backend = format!("d={path}{receive}");
    let (receiver, endpoint) = journey.receiver_with(ANY_PORT, &["--disk", &backend])?;
    let arguments = ["--verify", "--on-miss", "switch"];
    if kind == DiskKind::Qcow2 {
        // Some of what the guest was told to be written is not in the image: the destination would not find it.
        refused(&journey, &endpoint, &arguments, &["No space left on device"])?;
        end(receiver)?;
    } else {
        journey.hop_to(receiver, &endpoint, &arguments)?;
    }
    journey.vm.fail_on(FAILURES)?;
    journey.vm.read_on(READS)?;

    fs::remove_file(&filler)?;
    check_well(&journey.vm)?;
    let (receiver, endpoint) = journey.receiver_with(ANY_PORT, &["--disk", &backend])?;
    journey.hop_to(receiver, &endpoint, &arguments)?;
    check_well(&journey.vm)?;
    journey.verify()?;
    journey.end()
}

/// A guest that reads a disk, and where that is.
fn reading(options: &[&str]) -> Result<(Journey, PathBuf)> {
    let host = TestHost::new()?;
    let image = host.path("disk");
    raw(&image)?;
    let disk = format!("id=d,path={}", image.display());
    let journey = Journey::start(host, &READER, &[options, &["--disk", &disk]].concat())?;
    check_well(&journey.vm)?;
    Ok((journey, image))
}

/// A receiver with that disk, and where it listens.
fn receiver(journey: &Journey, disk: &Path) -> Result<(Vm, String)> {
    journey.receiver_with(ANY_PORT, &["--disk", &format!("d={}", disk.display())])
}

/// A move that is refused for that reason, and leaves the guest running.
fn refused(journey: &Journey, to: &str, options: &[&str], why: &[&str]) -> Result<()> {
    let line = journey.vm.migrate(to, options)?.stayed(Outcome::Failed)?;
    ensure!(
        why.iter().all(|word| line.contains(word)),
        "expected {why:?} in {line:?}"
    );
    journey.vm.check_running().map(drop)
}

/// Ends a receiver that is not needed any more.
fn end(receiver: Vm) -> Result<()> {
    receiver.process.signal(Signal::TERM)?;
    receiver.process.finish(PATIENCE)?.expect_code(0).map(drop)
}

#[test]
fn a_disk_that_shrinks_and_grows_again() -> Result<()> {
    let (mut journey, image) = reading(&[])?;
    let content = fs::read(&image)?;
    let file = File::options().write(true).open(&image)?;
    file.set_len(DISK_BYTES / 2)?;
    journey.vm.fail_on(FAILURES)?;
    journey.vm.read_on(READS)?;
    check_log(&journey.vm, "cannot read it")?;

    // The guest moves neither without the disk's content nor with it: what is missing would be read as zeroes, without an
    // error.
    let folder = journey.host.path("elsewhere");
    fs::create_dir(&folder)?;
    let (here, at) = receiver(&journey, &image)?;
    refused(&journey, &at, &[], &["4194304 bytes", "2097152 bytes"])?;
    let (there, at_other) = receiver(&journey, &folder.join("disk"))?;
    refused(&journey, &at_other, &["--with-disks"], &["it has shrunk"])?;
    end(there)?;
    ensure!(
        fs::read_dir(&folder)?.next().is_none(),
        "a part of a disk is left behind"
    );

    file.write_all_at(&content[content.len() / 2..], DISK_BYTES / 2)?;
    check_well(&journey.vm)?;
    journey.hop_to(here, &at, &["--verify", "--on-miss", "switch"])?;
    check_well(&journey.vm)?;
    journey.verify()?;
    journey.end()
}

#[test]
fn a_disk_whose_file_is_removed() -> Result<()> {
    let (mut journey, image) = reading(&[])?;
    let host = journey.host.clone();
    let content = fs::read(&image)?;
    fs::remove_file(&image)?;
    check_well(&journey.vm)?;

    let (here, at) = receiver(&journey, &image)?;
    refused(&journey, &at, &[], &["it was removed"])?;
    // Another file in its place is not the guest's, whatever its size.
    fs::write(&image, vec![0; content.len()])?;
    refused(&journey, &at, &[], &["it was removed"])?;
    end(here)?;
    for options in [&[][..], &["--keep-running"]] {
        let saved = host.path("saved");
        let saved_text = saved.display().to_string();
        let words = [&[saved_text.as_str()], options].concat();
        let refused = journey.vm.godwit("snapshot", &words)?;
        refused.expect_code(1)?;
        ensure!(
            refused.stderr.contains("it was removed") && !saved.exists(),
            "{refused:?}"
        );
        journey.vm.check_running()?;
    }
    ensure!(
        fs::read(&image)?.iter().all(|byte| *byte == 0),
        "another's file was written"
    );

    // With its content the disk goes on elsewhere.
    let elsewhere = host.path("elsewhere");
    let (there, at) = receiver(&journey, &elsewhere)?;
    journey.hop_to(there, &at, &["--with-disks", "--verify", "--on-miss", "switch"])?;
    check_well(&journey.vm)?;
    ensure!(fs::read(&elsewhere)? == content, "the disks differ");
    journey.verify()?;
    journey.end()
}

#[test]
fn a_disk_whose_file_is_removed_is_not_handed_over() -> Result<()> {
    let (journey, image) = reading(&["--shared-memory"])?;
    fs::remove_file(&image)?;
    raw(&image)?;
    let (listen, backend) = (
        format!("unix:{}", journey.host.path("receiver").display()),
        format!("d={}", image.display()),
    );
    let (receiver, endpoint) = journey.receiver_with(&listen, &["--disk", &backend])?;
    refused(&journey, &endpoint, &[], &["it was removed"])?;
    end(receiver)?;
    check_well(&journey.vm)?;
    journey.end()
}
