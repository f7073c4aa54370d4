//! Guests that go into files and come out of them: once, several times over, and after a life in between.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::Value;
use tests::{BareGuest, Journey, TestHost, TestProcess, Vm};

/// The text of a path, which the tests choose and which is therefore UTF-8.
fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no UTF-8")
}

/// Puts a journey's guest in files and goes on with what comes out of them.
fn through_files(journey: &mut Journey, name: &str, options: &[&str]) -> Result<PathBuf> {
    let directory = journey.host.path(name);
    journey.vm.snapshot(&directory, &[])?;
    let options = [&["--resume"], options].concat();
    let restored = journey.host.restore(&directory, &options)?;
    journey.arrive(restored)?;
    journey.vm.check_running()?;
    journey.verify()?;
    journey.check_life()?;
    Ok(directory)
}

#[test]
fn a_guest_goes_on_where_it_stood() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 192,
        cpus: 2,
        workset: "64M",
        rate: "100M",
        fill: true,
        ..Default::default()
    };
    let mut journey = Journey::start(TestHost::new()?, &guest, &[])?;
    // What was restored from a file and has changed since is put in the next.
    for (number, options) in [&[][..], &[], &["--preload"], &[]].into_iter().enumerate() {
        through_files(&mut journey, &format!("saved-{number}"), options)
            .with_context(|| format!("snapshot {number} {options:?}"))?;
    }
    journey.hop(&["--verify"])?;
    journey.verify()?;
    journey.end()
}

#[test]
fn what_was_never_written_takes_no_space() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 1024,
        workset: "16M",
        fill: false,
        ..Default::default()
    };
    let mut journey = Journey::start(TestHost::new()?, &guest, &[])?;
    let directory = through_files(&mut journey, "saved", &[])?;
    let memory = std::fs::metadata(directory.join("memory"))?;
    let stored = std::os::unix::fs::MetadataExt::blocks(&memory) * 512;
    ensure!(
        memory.len() == 1 << 30 && stored < 32 << 20,
        "got {stored} bytes stored of {}",
        memory.len()
    );
    journey.end()
}

#[test]
fn shared_memory_and_rings_are_no_obstacle() -> Result<()> {
    for option in ["--shared-memory", "--dirty-ring"] {
        let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[option])?;
        through_files(&mut journey, "saved", &[])?;
        journey.hop(&["--verify"])?;
        journey.verify()?;
        journey.end()?;
    }
    Ok(())
}

/// The counters of clock changes and of restores in a snapshot's VMClock page (UAPI.13), which the guest reads.
fn disruptions(directory: &Path) -> Result<(u64, u64)> {
    const PAGE: u64 = 0xfe000;
    let memory = std::fs::File::open(directory.join("memory"))?;
    let read = |at| -> Result<u64> {
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, PAGE + at)?;
        Ok(u64::from_le_bytes(bytes))
    };
    ensure!(
        read(0)? == 0x1000_4b4c_4356,
        "no VMClock in {}",
        directory.display()
    );
    Ok((read(0x10)?, read(0x68)?))
}

#[test]
fn vmclock_counts_moves_and_restores() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let path = |number: u32| journey.host.path(&format!("saved-{number}"));
    let paths: Vec<_> = (0..4).map(path).collect();
    let keep = ["--keep-running"];
    journey.vm.snapshot(&paths[0], &keep)?;
    journey.hop(&["--verify"])?;
    journey.vm.snapshot(&paths[1], &[])?;
    for (from, to) in [(1, 2), (2, 3)] {
        let restored = journey.host.restore(&paths[from], &["--resume"])?;
        journey.arrive(restored)?;
        journey
            .vm
            .snapshot(&paths[to], if to == 3 { &keep } else { &[] })?;
    }
    for (path, expected) in paths.iter().zip([(0, 0), (1, 0), (2, 1), (3, 2)]) {
        ensure!(
            disruptions(path)? == expected,
            "{}: expected {expected:?}, got {:?}",
            path.display(),
            disruptions(path)?
        );
    }
    journey.end()
}

#[test]
fn several_guests_from_one_snapshot() -> Result<()> {
    let mut first = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let host = first.host.clone();
    let directory = host.path("saved");
    let report = first.vm.snapshot(&directory, &["--keep-running"])?;
    let (paused, total) = (report["paused_ms"].as_f64(), report["total_ms"].as_f64());
    ensure!(paused.is_some() && paused < total, "got {report}");
    let clones: Vec<Journey> = (0..3)
        .map(|_| {
            Ok(Journey::of(
                host.clone(),
                host.restore(&directory, &["--resume"])?,
            ))
        })
        .collect::<Result<_>>()?;
    first.vm.check_running()?;
    first.verify()?;
    first.check_life()?;
    for mut clone in clones {
        clone.vm.check_running()?;
        clone.verify()?;
        clone.check_life()?;
        clone.vm.godwit("stop", &["--force"])?.expect_code(0)?;
        clone.vm.wait_success(tests::PATIENCE)?;
    }
    first.end()
}

/// Puts snapshots together and goes on with what comes of them.
fn go_on_from(journey: &mut Journey, parts: &[PathBuf], name: &str, options: &[&str]) -> Result<()> {
    let host = journey.host.clone();
    let whole = host.path(name);
    let parts: Vec<&str> = parts.iter().map(|part| text(part)).collect::<Result<_>>()?;
    let words = [&["snapshot", "merge"], &parts[..], &["--output", text(&whole)?]].concat();
    TestProcess::run(host.command(words), tests::PATIENCE)?.expect_code(0)?;
    let restored = host.restore(&whole, &[&["--resume"], options].concat())?;
    journey.arrive(restored)?;
    journey.vm.check_running()?;
    journey.verify()?;
    journey.check_life().map(drop)
}

/// Bytes that a snapshot's report says are stored.
fn stored(report: &Value) -> Result<u64> {
    report["stored_bytes"]
        .as_u64()
        .with_context(|| format!("no stored_bytes in {report}"))
}

#[test]
fn a_base_and_its_differences_are_a_guest() -> Result<()> {
    // Most of its memory stays as it is.
    let guest = BareGuest {
        memory_mib: 192,
        workset: "8M",
        rate: "40M",
        fill: true,
        ..Default::default()
    };
    for option in [&[][..], &["--dirty-ring"], &["--shared-memory"]] {
        let mut journey = Journey::start(TestHost::new()?, &guest, option)?;
        let mut parts = vec![journey.host.path("base")];
        let whole = stored(&journey.vm.snapshot(&parts[0], &["--keep-running"])?)?;
        for number in 0..3 {
            let mark = journey.vm.process.stdout().mark();
            journey.vm.check_running()?;
            ensure!(journey.vm.process.stdout().mark() > mark, "the guest did nothing");
            let directory = journey.host.path(&format!("difference-{number}"));
            let options = if number < 2 {
                &["--diff", "--keep-running"][..]
            } else {
                &["--diff"]
            };
            let report = journey.vm.snapshot(&directory, options)?;
            let got = stored(&report)?;
            ensure!(
                0 < got && got < whole / 8,
                "{option:?}, difference {number}: expected much less than {whole} bytes, got {report}"
            );
            parts.push(directory);
        }
        go_on_from(&mut journey, &parts, "whole", &[])?;
        journey.end()?;
    }
    Ok(())
}

#[test]
fn a_restored_guest_has_a_base_at_once() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 192,
        workset: "8M",
        fill: true,
        ..Default::default()
    };
    let mut journey = Journey::start(TestHost::new()?, &guest, &[])?;
    let base = through_files(&mut journey, "base", &[])?;
    let first = journey.host.path("first");
    let report = journey.vm.snapshot(&first, &["--diff", "--keep-running"])?;
    let got = stored(&report)?;
    ensure!(
        0 < got && got < 24 << 20,
        "expected little more than the working set, got {report}"
    );
    journey.vm.check_running()?;
    let second = journey.host.path("second");
    journey.vm.snapshot(&second, &["--diff"])?;
    // A difference alone cannot be restored.
    let host = journey.host.clone();
    let refused = TestProcess::run(host.command(["restore", text(&second)?]), tests::PATIENCE)?;
    refused.expect_code(1)?;
    for word in ["expected a whole snapshot", "godwit snapshot merge"] {
        ensure!(
            refused.stderr.contains(word),
            "expected {word:?} in {:?}",
            refused.stderr
        );
    }
    go_on_from(&mut journey, &[base, first, second], "whole", &["--preload"])?;
    // What was read as a whole is no mapping: there is nothing that a difference could be to.
    no_base(&journey, "third")?;
    journey.end()
}

/// A difference that is refused, and leaves the guest running.
fn no_base(journey: &Journey, name: &str) -> Result<()> {
    let directory = journey.host.path(name);
    let refused = journey
        .vm
        .godwit("snapshot", &[text(&directory)?, "--diff", "--keep-running"])?;
    refused.expect_code(1)?;
    ensure!(
        refused.stderr.contains("no base for a difference") && !directory.exists(),
        "got {refused:?}"
    );
    journey.vm.check_running().map(drop)
}

#[test]
fn memory_that_a_file_has_lost_is_neither_saved_nor_moved_as_zeroes() -> Result<()> {
    let journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let directory = journey.host.path("saved");
    journey.vm.snapshot(&directory, &["--keep-running"])?;
    let restored = journey.host.restore(&directory, &[])?;
    let memory = std::fs::File::options()
        .write(true)
        .open(directory.join("memory"))?;
    memory.set_len(memory.metadata()?.len() / 2)?;
    let again = journey.host.path("again");
    let again = again.to_str().context("a path that is no UTF-8")?;
    let (_receiver, endpoint) = journey.receiver("tcp:127.0.0.1:0")?;
    for (command, to) in [("snapshot", again), ("migrate", &endpoint)] {
        let refused = restored.godwit(command, &[to])?;
        refused.expect_code(1)?;
        ensure!(
            refused.stderr.contains("the rest of it is lost"),
            "{command}: {}",
            refused.stderr
        );
    }
    ensure!(restored.state()? == "Paused", "got {}", restored.status()?);
    ensure!(!journey.host.path("again").exists(), "a snapshot of what is lost");
    restored.godwit("stop", &[])?.expect_code(0)?;
    journey.vm.check_running().map(drop)
}

/// Takes the name of a snapshot that is being written, so that it fails; whether that was in time.
fn takes_the_name(directory: &Path) -> Result<bool> {
    let around = directory.parent().context("a directory around it")?;
    let mut deadline = tests::PATIENCE.begin();
    while deadline.left().is_some() && !directory.exists() {
        // Once the snapshot's draft is there, the name is checked again only when all is written.
        for entry in std::fs::read_dir(around)? {
            if entry?.file_name().to_string_lossy().starts_with(".taken.") {
                let made = std::fs::create_dir(directory);
                return Ok(made
                    .and_then(|()| std::fs::write(directory.join("mine"), ""))
                    .is_ok());
            }
        }
    }
    Ok(false)
}

#[test]
fn what_comes_to_nothing_is_in_the_next_difference() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 64,
        workset: "16M",
        fill: true,
        ..Default::default()
    };
    let mut journey = Journey::start(TestHost::new()?, &guest, &[])?;
    let host = journey.host.clone();
    no_base(&journey, "first")?;
    let mut parts = vec![host.path("base")];
    journey.vm.snapshot(&parts[0], &["--keep-running"])?;
    let directory = host.path("taken");
    let mut failed = 0;
    while failed < 2 {
        journey.vm.check_running()?;
        let words = ["snapshot", "vm-0", text(&directory)?, "--diff", "--keep-running"];
        let command = TestProcess::spawn(host.command(words))?;
        let taken = takes_the_name(&directory)?;
        let finished = command.finish(tests::PATIENCE)?;
        if taken {
            finished.expect_code(1)?;
            std::fs::remove_dir_all(&directory)?;
            failed += 1;
        } else {
            // The snapshot was faster, and is part of the chain.
            finished.expect_code(0)?;
            parts.push(host.path(&format!("part-{}", parts.len())));
            std::fs::rename(&directory, &parts[parts.len() - 1])?;
        }
    }
    journey.vm.check_running()?;
    parts.push(host.path("last"));
    journey.vm.snapshot(&parts[parts.len() - 1], &["--diff"])?;
    go_on_from(&mut journey, &parts, "whole", &[])?;
    journey.end()
}

#[test]
fn after_a_migration_there_is_no_base_for_a_difference() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let base = journey.host.path("base");
    journey.vm.snapshot(&base, &["--keep-running"])?;
    // No receiver is there, so the migration never starts dirty logging.
    let nobody = format!("unix:{}", text(&journey.host.path("nobody"))?);
    journey.vm.godwit("migrate", &[&nobody])?.expect_code(1)?;
    let difference = journey.host.path("difference");
    journey.vm.snapshot(&difference, &["--diff", "--keep-running"])?;
    journey.hop(&["--verify"])?;
    no_base(&journey, "after")?;
    journey.hop(&["--verify"])?;
    journey.verify()?;
    journey.end()
}

#[test]
fn a_restored_guest_waits_for_its_resume() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let directory = journey.host.path("saved");
    // That the guest was paused before makes no difference.
    journey.vm.godwit("pause", &[])?.expect_code(0)?;
    journey.vm.snapshot(&directory, &["--keep-running"])?;
    ensure!(journey.vm.state()? == "Paused", "got {}", journey.vm.state()?);
    let restored = journey.host.restore(&directory, &[])?;
    ensure!(restored.state()? == "Paused", "got {}", restored.state()?);
    let printed = restored.process.stdout().text();
    ensure!(printed.is_empty(), "a paused guest printed {printed:?}");
    restored.godwit("resume", &[])?.expect_code(0)?;
    restored.check_running()?;

    journey.vm.godwit("resume", &[])?.expect_code(0)?;
    journey.vm.check_running()?;
    drop(restored);
    journey.verify()?;
    journey.check_life().map(drop)
}

#[test]
fn what_cannot_be_written_leaves_the_guest_running() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let host = journey.host.clone();
    std::fs::create_dir(host.path("there"))?;
    std::fs::write(host.path("file"), "")?;
    for (name, words) in [
        ("there", &["there", "expected a path of which nothing exists"][..]),
        ("file", &["file", "expected a path of which nothing exists"]),
        ("missing/saved", &["missing", "No such file"]),
        ("file/saved", &["file", "Not a directory"]),
        ("/proc/saved", &["/proc", "No such file"]),
    ] {
        let directory = host.path(name);
        let finished = journey.vm.godwit("snapshot", &[text(&directory)?])?;
        finished.expect_code(1)?;
        for word in words {
            ensure!(
                finished.stderr.contains(word),
                "{name}: expected {word:?} in {:?}",
                finished.stderr
            );
        }
        journey.vm.check_running()?;
    }
    let mut left: Vec<_> = std::fs::read_dir(host.path(""))?
        .map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default()))
        .collect::<Result<_>>()?;
    left.sort();
    ensure!(left == ["file", "run", "there"], "left behind: {left:?}");
    journey.verify()?;
    journey.end()
}

#[test]
fn what_fails_half_way_leaves_the_guest_running() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 64,
        fill: true,
        ..Default::default()
    };
    let mut journey = Journey::start(TestHost::new()?, &guest, &[])?;
    let host = journey.host.clone();
    let pid = Pid::from_raw(journey.vm.process.id().cast_signed());
    let limit = |current| {
        let limit = Rlimit {
            current,
            maximum: None,
        };
        prlimit(pid, Resource::Fsize, limit).map(drop)
    };
    limit(Some(1 << 20))?;
    for options in [&[][..], &["--keep-running"]] {
        let directory = host.path("saved");
        let finished = journey
            .vm
            .godwit("snapshot", &[&[text(&directory)?], options].concat())?;
        finished.expect_code(1)?;
        ensure!(finished.stderr.contains("File too large"), "got {finished:?}");
        journey.vm.check_running()?;
    }
    ensure!(
        std::fs::read_dir(host.path(""))?.count() == 1,
        "something was left behind"
    );
    limit(None)?;
    through_files(&mut journey, "saved", &[])?;
    journey.end()
}

#[test]
fn its_disk_is_free_when_the_command_ends() -> Result<()> {
    let host = TestHost::new()?;
    let disk = host.path("disk");
    std::fs::write(&disk, [0; 4096])?;
    let shown = format!("data={}", text(&disk)?);
    let option = format!("id=data,path={}", text(&disk)?);
    let mut journey = Journey::start(host.clone(), &BareGuest::default(), &["--disk", &option])?;
    for number in 0..5 {
        let directory = host.path(&format!("saved-{number}"));
        journey.vm.snapshot(&directory, &[])?;
        // The same name, and the same disk, at once.
        let name = journey.vm.name.clone();
        let restored = host.restore_as(&name, &directory, &["--resume", "--disk", &shown])?;
        journey.arrive(restored)?;
        journey.vm.check_running()?;
    }
    journey.verify()?;
    journey.end()
}

fn is_busy(vm: &Vm) -> Result<bool> {
    Ok(vm.status()?["snapshot"].is_object())
}

/// Waits until a snapshot has begun, which must take longer than it takes to ask.
fn wait_until_busy(vm: &Vm) -> Result<()> {
    tests::wait_until("the snapshot to begin", || is_busy(vm))
}

#[test]
fn an_end_that_is_requested_meanwhile() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 1024,
        workset: "16M",
        fill: true,
        ..Default::default()
    };
    let mut vm = guest.boot(&TestHost::new()?, "vm-0", &[])?;
    let host = vm.host().clone();
    let directory = host.path("saved");
    let words = ["snapshot", "vm-0", text(&directory)?, "--keep-running"];
    let command = TestProcess::spawn(host.command(words))?;
    wait_until_busy(&vm)?;
    // Commands that conflict are refused; the others are served at once.
    let refused = vm.godwit("pause", &[])?;
    if is_busy(&vm)? {
        refused.expect_code(1)?;
    }
    vm.godwit("cancel", &[])?;
    let finished = command.finish(tests::PATIENCE)?;
    match finished.code {
        Some(1) => ensure!(
            finished.stderr.contains("cancelled") && !directory.exists(),
            "got {finished:?}"
        ),
        code => ensure!(code == Some(0) && directory.exists(), "got {finished:?}"),
    }
    vm.godwit("resume", &[])?.expect_code(0)?;
    vm.check_running()?;

    let again = host.path("again");
    let words = ["snapshot", "vm-0", text(&again)?, "--keep-running"];
    let command = TestProcess::spawn(host.command(words))?;
    wait_until_busy(&vm)?;
    vm.godwit("stop", &["--force"])?.expect_code(0)?;
    vm.wait_success(tests::PATIENCE)?;
    let finished = command.finish(tests::PATIENCE)?;
    ensure!(
        (finished.code == Some(0)) == again.exists(),
        "the command and the directory differ: {finished:?}"
    );
    host.check_clean()
}

/// Memory that is mapped from a file is lost when another program shortens the file. The guest's own access finds that
/// out, or an access of the VM's process.
#[test]
fn a_file_that_becomes_shorter_ends_the_vm_with_a_message() -> Result<()> {
    let journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let directory = journey.host.path("saved");
    // The guest's page tables are in the first half: without them nothing but a triple fault is left to it.
    for part in [2, u64::MAX] {
        journey.vm.snapshot(&directory, &["--keep-running"])?;
        let mut restored = journey.host.restore(&directory, &["--resume"])?;
        let memory = std::fs::File::options()
            .write(true)
            .open(directory.join("memory"))?;
        memory.set_len(memory.metadata()?.len() / part)?;
        // The guest reads all of its pages.
        let _ = restored.process.send(b"v");
        let finished = restored.process.finish(tests::PATIENCE)?;
        finished.expect_code(1)?;
        ensure!(
            finished.stderr.contains("a page of the guest's memory is lost"),
            "got {}",
            finished.stderr
        );
        std::fs::remove_dir_all(&directory)?;
    }
    journey.vm.check_running().map(drop)
}
