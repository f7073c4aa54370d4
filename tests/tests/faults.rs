//! Whatever ends a migration before the switch leaves the guest running at the source, ready for another.

#[path = "faults/any.rs"]
mod any;
#[path = "faults/pause.rs"]
mod pause;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use migration::{Outcome, Report};
use rustix::process::Signal;
use tests::{BareGuest, Journey, Migration, PATIENCE, TestHost, TestProcess, Vm, count, memory, wait_until};

const ANY_PORT: &str = "tcp:127.0.0.1:0";

/// A budget that a guest which dirties as fast as it can never keeps, so that pre-copy goes on for a while.
const HOPELESS: [&str; 2] = ["--max-downtime", "1ms"];

fn busy_guest() -> BareGuest<'static> {
    BareGuest {
        memory_mib: 1024,
        workset: "768M",
        rate: "max",
        ..Default::default()
    }
}

/// Waits until the VM's migration copies memory.
fn wait_for_precopy(vm: &Vm) -> Result<()> {
    wait_until("pre-copy", || {
        let migration = &vm.status()?["migration"];
        Ok(migration["phase"] == "precopy" && migration["bytes_sent"].as_u64() > Some(0))
    })
}

/// Pseudo-random numbers; the seed is printed and can be given as `GODWIT_SEED`.
struct Moments(u64);

impl Moments {
    fn seeded() -> Result<Self> {
        let seed = match std::env::var("GODWIT_SEED") {
            Ok(text) => text
                .parse()
                .with_context(|| format!("GODWIT_SEED: expected a number, got {text:?}"))?,
            Err(_) => RandomState::new().build_hasher().finish(),
        };
        println!("GODWIT_SEED={seed}");
        Ok(Self(seed))
    }

    /// Between nothing and `longest`.
    fn next(&mut self, longest: Duration) -> Duration {
        longest.mul_f64(self.share())
    }

    /// One of some things.
    fn choose<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[(self.share() * from.len() as f64) as usize]
    }

    /// Between 0 and 1, without 1.
    fn share(&mut self) -> f64 {
        // A linear congruential step (Knuth, MMIX); its upper bits are good enough to spread moments.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f64 / (1u64 << 24) as f64
    }
}

fn total(report: &Report) -> Duration {
    Duration::from_secs_f64(report.total_ms / 1e3)
}

/// Kills the destination `after` the begin of a migration. The guest must run on if that was before the switch;
/// returns whether it was.
fn kill_destination(journey: &Journey, after: Duration) -> Result<bool> {
    let (receiver, endpoint) = journey.receiver(ANY_PORT)?;
    let migration = journey.vm.start_migration(&endpoint, &["--verify"])?;
    // The moment is what this test is about: there is no event to wait for.
    std::thread::sleep(after);
    receiver.process.signal(Signal::KILL)?;
    drop(receiver);
    let migration = Migration::of(migration.finish(PATIENCE)?)?;
    if migration.code != Some(1) {
        // In doubt, or moved to a process that is dead now.
        if migration.code == Some(3) {
            ensure!(journey.vm.state()? == "In doubt", "got {}", journey.vm.status()?);
            journey.vm.godwit("resume", &[])?.expect_code(1)?;
        } else {
            migration.moved()?;
        }
        return Ok(false);
    }
    migration.stayed(Outcome::Failed)?;
    journey.vm.check_running()?;
    Ok(true)
}

#[test]
fn a_killed_destination() -> Result<()> {
    let (kills, guest) = (
        count(5)?,
        BareGuest {
            memory_mib: memory(512)?,
            workset: "",
            rate: "100M",
            ..Default::default()
        },
    );
    let mut moments = Moments::seeded()?;
    let begin = || Journey::start(TestHost::new()?, &guest, &[]);
    let mut journey = begin()?;
    let mut lasts = total(&journey.hop(&["--verify"])?);
    let (mut before, mut after) = (0, 0);
    while before < kills {
        ensure!(
            after <= kills + 5,
            "{after} kills came after the switch, only {before} before: nothing is tested"
        );
        let moment = moments.next(lasts);
        if kill_destination(&journey, moment).with_context(|| format!("killed after {moment:?}"))? {
            before += 1;
            lasts = total(&journey.hop(&["--verify"])?);
            journey.check_life()?;
        } else {
            // The guest died with the process that it had moved to, or stays paused, in doubt.
            after += 1;
            journey = begin()?;
            // The machine may have become faster since.
            lasts = total(&journey.hop(&["--verify"])?);
        }
    }
    println!("destination killed {before} times before the switch and {after} times after it");
    journey.verify()?;
    journey.end()
}

#[test]
fn a_hung_destination() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &busy_guest(), &[])?;
    let (receiver, endpoint) = journey.receiver(ANY_PORT)?;
    let migration = journey.vm.start_migration(&endpoint, &HOPELESS)?;
    wait_for_precopy(&journey.vm)?;
    receiver.process.signal(Signal::STOP)?;
    journey.vm.check_running()?;
    Migration::of(migration.finish(PATIENCE)?)?.stayed(Outcome::Failed)?;
    journey.vm.check_running()?;
    drop(receiver);
    journey.hop(&["--on-miss", "switch", "--verify"])?;
    journey.verify()?;
    journey.end()
}

#[test]
fn a_killed_source_leaves_a_receiver_that_takes_the_next() -> Result<()> {
    let host = TestHost::new()?;
    let lost = busy_guest().boot(&host, "lost", &[])?;
    let mut journey = Journey::start(host, &BareGuest::default(), &[])?;
    let (receiver, endpoint) = journey.receiver(ANY_PORT)?;
    let migration = lost.start_migration(&endpoint, &HOPELESS)?;
    wait_for_precopy(&lost)?;
    lost.process.signal(Signal::KILL)?;
    drop(lost);
    let finished = migration.finish(PATIENCE)?;
    ensure!(
        finished.code != Some(0),
        "a migration of a dead source succeeded: {finished:?}"
    );
    journey.hop_to(receiver, &endpoint, &["--verify"])?;
    journey.vm.check_running()?;
    journey.verify()?;
    journey.check_life().map(drop)
}

/// Starts a hopeless migration, lets `end` end it, and checks that the guest runs on and can move later.
fn cancelled_by(end: impl FnOnce(&Vm, &TestProcess) -> Result<()>) -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &busy_guest(), &[])?;
    let (receiver, endpoint) = journey.receiver(ANY_PORT)?;
    let migration = journey.vm.start_migration(&endpoint, &HOPELESS)?;
    wait_for_precopy(&journey.vm)?;
    end(&journey.vm, &migration)?;
    Migration::of(migration.finish(PATIENCE)?)?.stayed(Outcome::Cancelled)?;
    journey.vm.check_running()?;
    ensure!(
        journey.vm.status()?["migration"].is_null(),
        "still migrating: {}",
        journey.vm.status()?
    );
    journey.hop_to(receiver, &endpoint, &["--on-miss", "switch", "--verify"])?;
    journey.verify()?;
    journey.end()
}

#[test]
fn cancelled_by_ctrl_c() -> Result<()> {
    cancelled_by(|_, migration| migration.signal(Signal::INT))
}

#[test]
fn cancelled_by_command() -> Result<()> {
    cancelled_by(|vm, _| vm.godwit("cancel", &[])?.expect_code(0).map(drop))
}

#[test]
fn losing_the_client_cancels_nothing() -> Result<()> {
    let mut journey = Journey::start(
        TestHost::new()?,
        &BareGuest {
            memory_mib: 1024,
            ..Default::default()
        },
        &[],
    )?;
    let (receiver, endpoint) = journey.receiver(ANY_PORT)?;
    let migration = journey.vm.start_migration(&endpoint, &["--verify"])?;
    wait_for_precopy(&journey.vm)?;
    drop(migration);
    journey.arrive(receiver)?;
    journey.vm.check_running()?;
    journey.verify()?;
    journey.end()
}

#[test]
fn a_guest_that_ends_while_it_moves() -> Result<()> {
    let host = TestHost::new()?;
    let mut vm = busy_guest().boot(&host, "ends", &[])?;
    let (receiver, endpoint) = host.receive("waits", ANY_PORT, [""; 0])?;
    let migration = vm.start_migration(&endpoint, &HOPELESS)?;
    wait_for_precopy(&vm)?;
    vm.process.send(b"q")?;
    Migration::of(migration.finish(PATIENCE)?)?.stayed(Outcome::Cancelled)?;
    vm.process.wait_success(PATIENCE)?;
    ensure!(receiver.state()? == "Receiving", "got {}", receiver.status()?);

    let mut journey = Journey::start(host, &BareGuest::default(), &[])?;
    journey.hop_to(receiver, &endpoint, &["--on-miss", "switch", "--verify"])?;
    journey.verify()?;
    journey.end()
}

#[test]
fn conflicting_requests_are_refused_meanwhile() -> Result<()> {
    let journey = Journey::start(TestHost::new()?, &busy_guest(), &[])?;
    let (mut receiver, endpoint) = journey.receiver(ANY_PORT)?;
    let migration = journey.vm.start_migration(&endpoint, &HOPELESS)?;
    wait_for_precopy(&journey.vm)?;
    for refused in [
        journey.vm.godwit("pause", &[])?,
        journey.vm.godwit("migrate", &[&endpoint])?,
    ] {
        refused.expect_code(1)?;
        ensure!(
            refused.stderr.contains("migrat"),
            "expected the reason, got {:?}",
            refused.stderr
        );
    }
    journey.vm.godwit("cancel", &[])?.expect_code(0)?;
    Migration::of(migration.finish(PATIENCE)?)?.stayed(Outcome::Cancelled)?;
    let nothing = journey.vm.godwit("cancel", &[])?;
    nothing.expect_code(1)?;
    receiver.process.signal(Signal::TERM)?;
    receiver.wait_success(PATIENCE)?;
    journey.end()
}

#[test]
fn garbage_at_the_receivers_port() -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let (receiver, endpoint) = journey.receiver(ANY_PORT)?;
    let address = endpoint.strip_prefix("tcp:").context("endpoint")?;
    let huge = [0xff; 4096];
    let garbage: [&[u8]; 4] = [b"", b"GET / HTTP/1.1\r\n\r\n", &[0; 64], &huge];
    for bytes in garbage {
        let mut stream = std::net::TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE.longest))?;
        // The peer may hang up before it has read everything.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        ensure!(
            receiver.state()? == "Receiving",
            "after {bytes:?}: {}",
            receiver.status()?
        );
    }
    journey.hop_to(receiver, &endpoint, &["--verify"])?;
    journey.verify()?;
    journey.end()
}

/// Migrates to a destination that is not one: the guest must run on, and the error must name it.
fn fails_at(destination: &str, needle: &str) -> Result<()> {
    let mut journey = Journey::start(TestHost::new()?, &BareGuest::default(), &[])?;
    let migration = journey.vm.start_migration(destination, &[])?;
    journey.vm.check_running()?;
    let error = Migration::of(migration.finish(PATIENCE)?)?.stayed(Outcome::Failed)?;
    ensure!(error.contains(needle), "expected {needle:?} in {error:?}");
    journey.vm.check_running()?;
    journey.hop(&["--verify"])?;
    journey.end()
}

#[test]
fn a_silent_destination() -> Result<()> {
    // The kernel takes the connection, and no program ever answers.
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    fails_at(&format!("tcp:{address}"), &address)
}

#[test]
fn an_unreachable_destination() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    drop(listener);
    fails_at(&format!("tcp:{address}"), &address)?;
    fails_at("unix:/nonexistent/migrate.sock", "/nonexistent/migrate.sock")
}

#[test]
fn a_destination_that_sends_nonsense() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let nonsense = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")?;
        // Reads until the other side hangs up.
        std::io::copy(&mut stream, &mut std::io::sink()).map(drop)
    });
    fails_at(&format!("tcp:{address}"), &address)?;
    nonsense
        .join()
        .ok()
        .context("the false destination panicked")?
        .context("the false destination")
}

#[test]
fn a_destination_that_cannot_run_the_machine() -> Result<()> {
    let host = TestHost::new()?;
    let image = host.path("disk");
    std::fs::File::create(&image)?.set_len(1 << 20)?;
    let disk = format!("id=data,path={}", image.display());
    let mut journey = Journey::start(host, &BareGuest::default(), &["--disk", &disk])?;

    let (mut small, endpoint) = journey.host.receive("small", ANY_PORT, ["--max-memory", "32M"])?;
    let error = journey.vm.migrate(&endpoint, &[])?.stayed(Outcome::Failed)?;
    ensure!(
        error.contains("memory") && error.contains("data"),
        "expected both differences in {error:?}"
    );
    journey.vm.check_running()?;
    ensure!(small.state()? == "Receiving", "got {}", small.status()?);

    let image = format!("data={}", image.display());
    let (receiver, endpoint) = journey.host.receive("large", ANY_PORT, ["--disk", &image])?;
    journey.hop_to(receiver, &endpoint, &["--verify"])?;
    let again = journey
        .host
        .run("again", journey_options(&journey.host, &disk)?)?
        .process
        .finish(PATIENCE)?;
    again.expect_code(1)?;
    ensure!(
        again.stderr.contains("lock"),
        "expected the destination to hold the disk's lock, got {:?}",
        again.stderr
    );
    journey.verify()?;
    small.process.signal(Signal::TERM)?;
    small.wait_success(PATIENCE)?;
    journey.end()
}

fn journey_options(host: &TestHost, disk: &str) -> Result<Vec<String>> {
    let mut options = BareGuest::default().options(host)?;
    options.extend(["--disk".into(), disk.into()]);
    Ok(options)
}
