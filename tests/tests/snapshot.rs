//! Guests that go into files and come out of them: once, several times over, and after a life in between.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::Value;
use tests::{BareGuest, Host, Journey, Process, Vm};

/// The text of a path of ours.
fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no UTF-8")
}

/// Puts a guest in files; the report.
fn snapshot(vm: &Vm, to: &Path, options: &[&str]) -> Result<Value> {
    let arguments = [&[text(to)?, "--json"], options].concat();
    let finished = vm.godwit("snapshot", &arguments)?;
    serde_json::from_str(&finished.expect_code(0)?.stdout).context("report")
}

/// Puts a journey's guest in files and goes on with what comes out of them.
fn through_files(journey: &mut Journey, name: &str, options: &[&str]) -> Result<PathBuf> {
    let directory = journey.host.path(name);
    snapshot(&journey.vm, &directory, &[])?;
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
    };
    let mut journey = Journey::start(Host::new()?, &guest, &[])?;
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
    let mut journey = Journey::start(Host::new()?, &guest, &[])?;
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
        let mut journey = Journey::start(Host::new()?, &BareGuest::default(), &[option])?;
        through_files(&mut journey, "saved", &[])?;
        journey.hop(&["--verify"])?;
        journey.verify()?;
        journey.end()?;
    }
    Ok(())
}

#[test]
fn several_guests_from_one_snapshot() -> Result<()> {
    let mut first = Journey::start(Host::new()?, &BareGuest::default(), &[])?;
    let host = first.host.clone();
    let directory = host.path("saved");
    let report = snapshot(&first.vm, &directory, &["--keep-running"])?;
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

#[test]
fn a_restored_guest_waits_for_its_resume() -> Result<()> {
    let mut journey = Journey::start(Host::new()?, &BareGuest::default(), &[])?;
    let directory = journey.host.path("saved");
    // Whether somebody had paused it makes no difference.
    journey.vm.godwit("pause", &[])?.expect_code(0)?;
    snapshot(&journey.vm, &directory, &["--keep-running"])?;
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
    let mut journey = Journey::start(Host::new()?, &BareGuest::default(), &[])?;
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
    let mut journey = Journey::start(Host::new()?, &guest, &[])?;
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
    let host = Host::new()?;
    let disk = host.path("disk");
    std::fs::write(&disk, [0; 4096])?;
    let shown = format!("data={}", text(&disk)?);
    let option = format!("id=data,path={}", text(&disk)?);
    let mut journey = Journey::start(host.clone(), &BareGuest::default(), &["--disk", &option])?;
    for number in 0..5 {
        let directory = host.path(&format!("saved-{number}"));
        snapshot(&journey.vm, &directory, &[])?;
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
    let begin = Instant::now();
    while !is_busy(vm)? {
        ensure!(begin.elapsed() < tests::PATIENCE, "no snapshot: {}", vm.status()?);
    }
    Ok(())
}

#[test]
fn an_end_that_is_asked_for_meanwhile() -> Result<()> {
    let guest = BareGuest {
        memory_mib: 1024,
        workset: "16M",
        fill: true,
        ..Default::default()
    };
    let mut vm = guest.boot(&Host::new()?, "vm-0", &[])?;
    let host = vm.host().clone();
    let directory = host.path("saved");
    let words = ["snapshot", "vm-0", text(&directory)?, "--keep-running"];
    let command = Process::spawn(host.command(words))?;
    wait_until_busy(&vm)?;
    // What would conflict is refused, and the rest waits for nobody.
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
    let command = Process::spawn(host.command(words))?;
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
