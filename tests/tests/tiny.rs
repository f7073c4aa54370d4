//! A real Linux on the machine's own KVM, whatever kind that is.

use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use tests::{GuestEvent, Journey, PATIENCE, TestHost, TinyGuest, Vm};

const MOVES: u32 = 2;
/// How long the guest lies in files, by which its clocks must go on.
const AWAY: Duration = Duration::from_secs(3);
/// How far a guest's time may be from the host's when its tick is read: ticks may come late.
const CLOCK_ERROR: Duration = Duration::from_secs(1);

/// One boot for all of it: where kernel code is interpreted it takes most of half a minute.
#[test]
fn linux_boots_moves_under_load_and_powers_off() -> Result<()> {
    // On some hosts a guest's TSC is the host's, whatever is asked of KVM. kvmclock is not.
    let guest = TinyGuest {
        words: "clocksource=kvm-clock",
        ..Default::default()
    };
    let begin = Instant::now();
    let mut journey = guest.start(TestHost::new()?, &[])?;
    let boot = begin.elapsed().as_secs_f64();

    let mut dirtied = journey.vm.check_running()?.pages;
    let mut downtimes = Vec::new();
    for number in 1..=MOVES {
        let report = journey
            .hop_and_check_gap(&["--verify"])
            .with_context(|| format!("move {number} of {MOVES}"))?;
        ensure!(
            report.memory_digest.is_some(),
            "no digest with --verify: {report:?}"
        );
        ensure!(
            report.pages_sent >= guest.workset_mib << 8,
            "fewer pages than the workload has: {report:?}"
        );
        let pages = journey.vm.check_running()?.pages;
        ensure!(
            pages > dirtied,
            "the workload stands still: {dirtied} pages before the move, {pages} after it"
        );
        dirtied = pages;
        downtimes.push(report.downtime_ms.context("no downtime")?);
    }
    // Over a link that is slow also beside a CPU that is: the kernel's own memory shrinks, and the workload's, which cannot, goes as it is.
    let report = journey.hop(&["--verify", "--compression", "zstd", "--bandwidth", "40MB/s"])?;
    println!(
        "compressed: {} bytes for {} pages",
        report.bytes_sent, report.pages_sent
    );
    ensure!(
        report.bytes_sent < report.pages_sent * 4096,
        "nothing was compressed: {report:?}"
    );
    journey.vm.check_running()?;
    let verified = journey.verify()?;
    ensure!(
        verified == guest.workset_mib << 8,
        "expected all pages to be verified, got {verified}"
    );
    through_files_for_a_while(&mut journey)?;
    through_files_with_its_clocks_kept(&mut journey)?;
    journey.end()?;
    println!(
        "{} vCPUs up in {boot:.1} s, {dirtied} pages dirtied, downtimes {downtimes:.1?} ms",
        guest.cpus
    );
    Ok(())
}

/// By how much the guest's wall clock differs from the host's, in microseconds.
fn wall_clock_error(vm: &Vm) -> Result<i64> {
    let stdout = vm.process.stdout();
    let tick = stdout.wait("a tick", stdout.mark(), PATIENCE, |line| {
        GuestEvent::named(line, "tick")
    })?;
    let guest = i64::try_from(tick.number("real_us")?)?;
    let host = SystemTime::UNIX_EPOCH.elapsed()?.as_micros();
    Ok(guest - i64::try_from(host)?)
}

/// After a restore the guest has a new generation ID, after a migration it has not. Its clocks go on meanwhile.
fn through_files_for_a_while(journey: &mut Journey) -> Result<()> {
    let life = journey.life()?;
    ensure!(
        !life.contains("agent: fork"),
        "moves gave it another generation: {life}"
    );
    let before = wall_clock_error(&journey.vm)?;
    let directory = journey.host.path("saved");
    journey.vm.snapshot(&directory, &[])?;
    sleep(AWAY);
    let restored = journey.host.restore(&directory, &["--resume"])?;
    journey.arrive(restored)?;
    journey
        .vm
        .process
        .stdout()
        .wait("agent: fork", 0, PATIENCE, |line| GuestEvent::named(line, "fork"))?;
    let after = wall_clock_error(&journey.vm)?;
    ensure!(
        before.abs_diff(after) < CLOCK_ERROR.as_micros() as u64,
        "its wall clock was {before} µs from the host's, and is {after} µs from it"
    );
    journey.verify().map(drop)
}

/// The guest's clock does not see the time that it lay there.
fn through_files_with_its_clocks_kept(journey: &mut Journey) -> Result<()> {
    let begin = Instant::now();
    let before = journey.vm.next_tick()?;
    let directory = journey.host.path("kept");
    journey.vm.snapshot(&directory, &[])?;
    let saved = Instant::now();
    sleep(AWAY);
    let away = saved.elapsed();
    let restored = journey
        .host
        .restore(&directory, &["--resume", "--clock", "keep"])?;
    let after = restored.next_tick()?;
    let present = begin.elapsed() - away;
    let went = Duration::from_micros(after.us.checked_sub(before.us).context("its clock went back")?);
    ensure!(
        went <= present,
        "it was there for {present:?} and away for {away:?}, its clock went by {went:?}"
    );
    journey.arrive(restored)
}
