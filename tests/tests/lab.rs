//! Debian guests on emulated hosts with ordinary KVM: unmodified kernels, real hosts, power cuts.

#[path = "lab/console.rs"]
mod console;
#[path = "lab/mirror.rs"]
mod mirror;
#[path = "lab/network.rs"]
mod network;
#[path = "lab/snapshots.rs"]
mod snapshots;
#[path = "lab/together.rs"]
mod together;
#[path = "lab/unused.rs"]
mod unused;

use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Payload, Signal};
use migration::{DataPath, Outcome, Phase, Progress};
use serde_json::Value;
use tests::{
    ECHO_PORT, Fixtures, LabJourney, PATIENCE, StockGuest, TestProcess, count, ended, payload, wait_for,
    wait_until,
};

/// Emulated hosts are slow, and how slow says nothing: no move fails for its downtime.
const ANY_DOWNTIME: [&str; 2] = ["--on-miss", "switch"];
/// In pre-copy for long enough to cut the power.
const SLOWLY: [&str; 4] = ["--on-miss", "switch", "--bandwidth", "4MiB/s"];
/// Has the guest read random numbers all the time.
const RANDOM: &str = "godwit.random=/dev/hwrng";
const VERIFIED: [&str; 3] = ["--on-miss", "switch", "--verify"];

fn two_hosts() -> Result<Lab> {
    Ok(Lab::builder(payload(&Fixtures::from_env()?)).hosts(2).start()?)
}

/// Runs a tool of this machine, and fails if that does.
fn tool(words: &[&str]) -> Result<()> {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    // A user's path may lack these folders.
    command.env(
        "PATH",
        format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()),
    );
    TestProcess::run(command, PATIENCE)?
        .expect_code(0)
        .with_context(|| words.join(" "))
        .map(drop)
}

/// An image with an empty file system, and the folder that it goes with, in memory: what a guest flushes would else wait
/// for everything that any program has written to the machine's disk.
fn formatted_disk() -> Result<(tempfile::TempDir, String)> {
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let image = directory.path().join("disk").display().to_string();
    std::fs::File::create(&image)?.set_len(64 << 20)?;
    tool(&["mkfs.ext4", "-q", "-F", &image])?;
    Ok((directory, image))
}

#[test]
fn a_debian_guest_back_and_forth() -> Result<()> {
    let (_directory, image) = formatted_disk()?;
    let lab = Lab::builder(payload(&Fixtures::from_env()?))
        .hosts(2)
        .shared_image(&image)
        .start()?;
    let mut journey = LabJourney::start(
        lab,
        StockGuest {
            disk: true,
            ..Default::default()
        },
    )?;
    let moves = count(2)?;
    for number in 1..=moves {
        let report = journey
            .hop(&VERIFIED)
            .with_context(|| format!("move {number} of {moves}"))?;
        ensure!(
            report.memory_digest.is_some(),
            "no digest with --verify: {report:?}"
        );
        let verified = journey
            .verify()
            .with_context(|| format!("after move {number} of {moves}"))?;
        // Their network cards read guest memory themselves, which loopback never shows.
        ensure!(
            report.data_path == DataPath::Zerocopy,
            "move {number} of {moves} copied its content: {report:?}"
        );
        let (pages, files) = (verified.number("pages")?, verified.number("files")?);
        println!("move {number} of {moves}: {pages} pages and {files} files verified");
    }
    drop(journey.power_off()?);
    tool(&["e2fsck", "-fn", &image])
}

/// Runs a script on a host, and fails if that does.
fn shell(lab: &Lab, host: usize, script: &str) -> Result<()> {
    let done = lab.host(host).run(&["sh", "-ec", script])?;
    ensure!(
        done.status.success(),
        "host {host}, {script}: {}{}",
        done.stdout,
        done.stderr
    );
    Ok(())
}

/// What hosts carry, and a program that has streams to guests.
fn payload_with_echo() -> Result<Payload> {
    Ok(payload(&Fixtures::from_env()?).with("bin/vsock-echo", env!("CARGO_BIN_EXE_vsock-echo")))
}

/// A program on the host that the guest is on, with a stream to the guest.
fn connect(journey: &LabJourney) -> Result<lab::LabProcess> {
    start_echo(journey, StockGuest::VSOCK, &ECHO_PORT.to_string())
}

fn start_echo(journey: &LabJourney, uds: &str, port: &str) -> Result<lab::LabProcess> {
    let words = ["vsock-echo", uds, port];
    let mut program = journey.lab.host(journey.host()).spawn(&words)?;
    program.wait_line(|line| line == "connected", PATIENCE)?;
    Ok(program)
}

/// Sends so much there and back.
fn echo(program: &mut lab::LabProcess, bytes: usize) -> Result<()> {
    program.write_stdin(format!("{bytes}\n").as_bytes())?;
    program.wait_line(|line| line == "echoed", PATIENCE)?;
    Ok(())
}

#[test]
fn random_numbers_across_moves() -> Result<()> {
    let guest = StockGuest {
        words: RANDOM,
        ..Default::default()
    };
    let mut journey = LabJourney::start(two_hosts()?, guest)?;
    journey.check_growing("random")?;
    for number in 1..=2 {
        let on = || format!("move {number}");
        journey.hop(&VERIFIED).with_context(on)?;
        let random = journey.check_growing("random").with_context(on)?;
        println!("move {number}: {random} random bytes");
    }
    journey.verify()?;
    journey.power_off().map(drop)
}

#[test]
fn streams_to_a_debian_guest_on_whichever_host() -> Result<()> {
    const MUCH: usize = 512 << 10;
    let lab = Lab::builder(payload_with_echo()?).hosts(2).start()?;
    let guest = StockGuest {
        vsock: true,
        ..Default::default()
    };
    let mut journey = LabJourney::start(lab, guest)?;
    journey.event("vsock")?;
    for number in 1..=2 {
        let mut from_host = connect(&journey)?;
        echo(&mut from_host, MUCH)?;
        let words = ["vsock-echo", &format!("{}_52", StockGuest::VSOCK)];
        let mut from_guest = journey.lab.host(journey.host()).spawn(&words)?;
        from_guest.wait_line(|line| line == "listening", PATIENCE)?;
        journey.vm.write_stdin(b"dial 52\n")?;
        from_guest.wait_line(|line| line == "connected", PATIENCE)?;
        echo(&mut from_guest, MUCH)?;

        journey.hop(&VERIFIED).with_context(|| format!("move {number}"))?;
        for mut program in [from_host, from_guest] {
            program.write_stdin(b"end\n")?;
            program.wait_line(|line| line == "ended", PATIENCE)?;
        }
        let mut again = connect(&journey).with_context(|| format!("after move {number}"))?;
        echo(&mut again, MUCH).with_context(|| format!("after move {number}"))?;
        // By now it is on its way to the console.
        journey.wait_for_words(" end=connection-reset", 2)?;
        drop(again);
    }
    journey.verify()?;
    journey.power_off().map(drop)
}

#[test]
fn kernels_of_both_formats_with_and_without_acpi() -> Result<()> {
    let mut lab = Arc::new(Lab::builder(payload(&Fixtures::from_env()?)).start()?);
    // Debian's kernel is built without MP tables, so it finds one CPU where it must do without ACPI.
    for (kernel, words, cpus) in [("vmlinuz", "", 4), ("vmlinux", "acpi=off", 1)] {
        let guest = StockGuest {
            kernel,
            words,
            cpus,
            ..Default::default()
        };
        let mut journey = LabJourney::start(lab, guest).with_context(|| format!("{kernel} {words}"))?;
        journey.verify()?;
        // Without ACPI a guest cannot power itself off; it can reset.
        let end: &[u8] = if words.is_empty() {
            b"poweroff\n"
        } else {
            b"reboot\n"
        };
        journey.vm.write_stdin(end)?;
        lab = journey.ended().with_context(|| format!("{kernel} {words}"))?;
    }
    Ok(())
}

#[test]
fn the_power_button_shuts_a_guest_down() -> Result<()> {
    let lab = Lab::builder(payload(&Fixtures::from_env()?)).start()?;
    let mut journey = LabJourney::start(lab, StockGuest::default())?;
    journey.check_running()?;
    journey.vm.signal(Signal::Terminate)?;
    journey
        .vm
        .wait_line(|line| line == "agent: power button", PATIENCE)?;
    journey.ended().map(drop)
}

#[test]
fn a_host_with_another_cpu_is_refused() -> Result<()> {
    let payload = payload(&Fixtures::from_env()?);
    let lab = Lab::builder(payload)
        .hosts(2)
        .cpu(1, "EPYC,+svm,+npt,-avx2")
        .start()?;
    let mut journey = LabJourney::start(lab, StockGuest::default())?;
    let (receiver, endpoint) = journey.receiver()?;
    let line = journey
        .migrate(&endpoint, &ANY_DOWNTIME)?
        .stayed(Outcome::Failed)?;
    ensure!(
        line.contains("cpuid") && line.contains("avx2"),
        "expected the difference in {line:?}"
    );
    journey.check_running()?;
    drop(receiver);
    journey.power_off().map(drop)
}

/// Returns once something that a balloon's statistics say is so.
fn wait_for_balloon(journey: &LabJourney, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    wait_for("the balloon's statistics", || {
        Ok(Some(journey.godwit_json("balloon", &[])?).filter(|statistics| wanted(statistics)))
    })
}

/// KiB of the host's memory that the guest's process has.
fn resident(journey: &LabJourney) -> Result<u64> {
    let pid = journey.godwit_json("status", &[])?["pid"].to_string();
    let status = journey
        .lab
        .host(journey.host())
        .run(&["cat", &format!("/proc/{pid}/status")])?;
    let resident = status.stdout.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = resident.and_then(|text| text.trim().strip_suffix(" kB")?.parse().ok());
    kib.with_context(|| format!("no VmRSS of process {pid}: {}{}", status.stdout, status.stderr))
}

/// Bytes that a move takes of a guest that has used most of its memory once, and does no longer. If it has a balloon,
/// the host has that memory back before the move.
fn move_after_churn(journey: &mut LabJourney, has_balloon: bool) -> Result<u64> {
    /// Far less than has been used, more than the guest needs.
    const GIVEN_BACK_KIB: u64 = 150 << 10;
    journey.command("churn 384", "churned")?;
    if has_balloon {
        wait_until("the guest's memory to come back", || {
            Ok(resident(journey)? <= GIVEN_BACK_KIB)
        })?;
    }
    let report = journey.hop(&VERIFIED)?;
    journey.verify()?;
    Ok(report.bytes_sent)
}

#[test]
fn a_balloon_and_what_it_saves() -> Result<()> {
    let guest = StockGuest {
        memory: "512M",
        ..Default::default()
    };
    let mut journey = LabJourney::start(two_hosts()?, guest.clone())?;
    let without = move_after_churn(&mut journey, false)?;
    let lab = journey.power_off()?;

    let guest = StockGuest {
        options: &["--balloon"],
        ..guest
    };
    let mut journey = LabJourney::start(lab, guest)?;
    let with = move_after_churn(&mut journey, true)?;
    println!("a guest that uses little of its memory: {without} bytes without, {with} with a balloon");
    ensure!(
        with * 10 <= without * 3,
        "expected at most 0.3 of {without} bytes, got {with}"
    );

    // The balloon grows while the guest moves, and is as large where the guest arrives.
    journey.godwit_json("balloon", &["128M"])?;
    journey.hop(&VERIFIED)?;
    // An emulated guest may be slow to report.
    let reported = |statistics: &Value, mib: u64| {
        statistics["actual_mib"] == mib
            && statistics["target_mib"] == mib
            && statistics["total_memory"].is_u64()
    };
    wait_for_balloon(&journey, |statistics| reported(statistics, 128))?;
    journey.hop(&VERIFIED)?;
    journey.godwit_json("balloon", &["0M"])?;
    wait_for_balloon(&journey, |statistics| reported(statistics, 0))?;
    journey.verify()?;
    journey.power_off().map(drop)
}

/// Returns once the guest's migration copies memory.
fn wait_for_precopy(journey: &LabJourney) -> Result<()> {
    wait_until("pre-copy", || {
        let copies = |progress: Progress| progress.phase == Phase::Precopy && progress.bytes_sent > 0;
        Ok(journey.progress()?.is_some_and(copies))
    })
}

#[test]
fn a_source_that_loses_its_power() -> Result<()> {
    let journey = LabJourney::start(two_hosts()?, StockGuest::default())?;
    let (receiver, endpoint) = journey.receiver()?;
    let _migration = journey.start_migration(&endpoint, &SLOWLY)?;
    wait_for_precopy(&journey)?;
    journey.lab.host(0).kill();
    // The guest is gone with its host. The receiver, which got no word of that, gives up what it has of it and takes
    // the next one.
    let lab = journey.lab;
    let hears_nothing = |line: &str| line.contains("waiting for the next attempt");
    let mut receiver = receiver;
    receiver.wait_line(hears_nothing, PATIENCE)?;
    lab.host(0).restart()?;
    let mut journey = LabJourney::start(lab, StockGuest::default())?;
    journey.hop_to(receiver, &endpoint, &VERIFIED)?;
    journey.verify()?;
    journey.power_off().map(drop)
}

#[test]
fn a_destination_that_loses_its_power() -> Result<()> {
    let mut journey = LabJourney::start(two_hosts()?, StockGuest::default())?;
    let (receiver, endpoint) = journey.receiver()?;
    let migration = journey.start_migration(&endpoint, &SLOWLY)?;
    wait_for_precopy(&journey)?;
    journey.lab.host(1).kill();
    ended(migration)?.stayed(Outcome::Failed)?;
    journey.check_running()?;
    drop(receiver);
    journey.lab.host(1).restart()?;
    journey.hop(&VERIFIED)?;
    journey.verify()?;
    journey.power_off().map(drop)
}
