//! `cargo xtask demo`: a Linux guest moves under load, and nothing is lost.

mod scene;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ::lab::Lab;
use anyhow::{Context, Result, ensure};
use migration::Report;
use tests::{
    Finished, Fixtures, GuestEvent, Journey, LabJourney, Migration, PATIENCE, StockGuest, TestHost, Tick,
    TinyGuest, check_ticks, payload,
};

use crate::guests;
use crate::packages;
use crate::runner::{build_godwit, has_kvm};
use crate::workspace::{output, print_status, root};
use scene::Scene;

/// Heartbeats that are shown before the move and after it.
const SHOWN: usize = 3;
/// Bytes of the disk that both hosts see.
const DISK_BYTES: u64 = 64 << 20;
/// The time between two of the guest's heartbeats: the agent's default.
const BEAT_MS: u32 = 50;
/// What is asked of a move between processes: a link that is slow enough to watch, and a promise all the same.
const PROMISE: [&str; 6] = [
    "--bandwidth",
    "150MiB/s",
    "--max-downtime",
    "50ms",
    "--deadline",
    "60s",
];
/// Said before the second move. It is a move of its own because the guest stands still while both sides compute: a gap
/// by its own clock that is no downtime.
const DIGESTS: &str =
    "Moving it once more, to compare digests of all memory while the guest stands still for that…";

#[derive(clap::Args)]
pub(crate) struct DemoOptions {
    /// Print nothing but the report of the move that compares digests on stdout, as one JSON object
    #[arg(long)]
    json: bool,
}

/// The reports of both moves.
struct DemoReports {
    /// Of the one that is watched.
    first: Report,
    /// Of the one that compares digests.
    verified: Report,
}

/// Prints what happens: on stdout, or on stderr where stdout is for the report alone.
#[derive(Clone, Copy)]
struct Narrator {
    json: bool,
}

impl Narrator {
    fn print(self, what: impl std::fmt::Display) {
        if self.json {
            eprintln!("{what}")
        } else {
            println!("{what}")
        }
    }
}

/// Builds what the scene for this machine needs, and plays it. An error if anything is not as promised.
pub(crate) fn run(options: &DemoOptions) -> Result<()> {
    let narrator = Narrator { json: options.json };
    print_status("building godwit");
    let mut fixtures = Fixtures {
        godwit: build_godwit()?,
        guests: PathBuf::new(),
    };
    let scene = Scene::of(&fixtures.probe()?, has_kvm())?;
    narrator.print(scene.reason());
    packages::ensure(scene.packages())?;
    fixtures.guests = guests::build(scene.artifacts())?;
    let reports = match scene {
        Scene::HardwareKvm => between_processes(boot_stock(&fixtures, narrator)?, narrator)?,
        Scene::PvmKvm => between_processes(boot_tiny(&fixtures, narrator)?, narrator)?,
        Scene::EmulatedHosts => between_hosts(&fixtures, narrator)?,
    };
    if options.json {
        println!("{}", serde_json::to_string(&reports.verified)?);
    } else {
        println!("What `godwit migrate --json` reported of the first move:");
        println!("{}", serde_json::to_string_pretty(&reports.first)?);
    }
    Ok(())
}

/// Between two emulated hosts and back, memory and a shared disk under load.
fn between_hosts(fixtures: &Fixtures, narrator: Narrator) -> Result<DemoReports> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk");
    std::fs::File::create(&image)?.set_len(DISK_BYTES)?;
    output(administration("mkfs.ext4").args(["-q", "-F"]).arg(&image))?;
    narrator.print("Starting two hosts…");
    let lab = Lab::builder(payload(fixtures))
        .hosts(2)
        .shared_image(&image)
        .start()?;
    narrator.print("Booting the guest on the first: 2 CPUs, 256 MiB, memory and a shared disk under load…");
    let mut journey = LabJourney::start(
        lab,
        StockGuest {
            disk: true,
            ..Default::default()
        },
    )?;
    let heartbeats = |journey: &mut LabJourney| -> Result<Tick> {
        for _ in 0..SHOWN {
            let line = journey
                .vm
                .wait_line(|line| Tick::parse(line).is_some(), PATIENCE)?;
            narrator.print(format_args!("  host {} | {line}", journey.host()));
        }
        journey.tick()
    };
    journey.command("reset", "reset")?;
    let before = heartbeats(&mut journey)?;
    narrator.print("Moving it to the second…");
    // Which downtime an emulated host makes of it is left open: it is moved all the same, and the report says so.
    let first = journey.hop(&["--on-miss", "switch"])?;
    let after = heartbeats(&mut journey)?;
    narrator.print(compared(&first, before, after)?);
    narrator.print(DIGESTS);
    let verified = journey.hop(&["--verify", "--on-miss", "switch"])?;
    narrator.print(equal(&verified)?);
    let checked = journey.verify()?;
    let (pages, files) = (checked.number("pages")?, checked.number("files")?);
    narrator.print(format_args!(
        "The guest has checked {pages} pages and {files} files of its own: no error."
    ));
    journey.power_off()?;
    output(administration("e2fsck").arg("-fn").arg(&image)).context("the guest's file system")?;
    narrator.print("The guest has powered itself off; its file system checks clean.");
    Ok(DemoReports { first, verified })
}

/// A Debian guest in a process of this machine, memory under load.
fn boot_stock(fixtures: &Fixtures, narrator: Narrator) -> Result<Journey> {
    let host = TestHost::with(fixtures.clone())?;
    let guest = StockGuest::default();
    narrator.print("Booting the guest: 2 CPUs, 256 MiB, memory under load…");
    let vm = host.run("vm-0", guest.options(&fixtures.guests.display().to_string()))?;
    vm.process.stdout().wait("agent: ready", 0, PATIENCE, |line| {
        GuestEvent::named(line, "ready")
    })?;
    Ok(Journey::agent(host, vm))
}

/// The tiny guest in the same way.
fn boot_tiny(fixtures: &Fixtures, narrator: Narrator) -> Result<Journey> {
    let guest = TinyGuest {
        workset_mib: 512,
        rate: "200M",
        ..TinyGuest::default()
    };
    narrator.print("Booting the guest: 2 CPUs, 576 MiB, memory under load; this takes half a minute…");
    guest.start(TestHost::with(fixtures.clone())?, &[])
}

/// Moves a guest that is up to a second process, over a link that is made slow enough to watch, and then in the same way to a
/// third to compare digests.
fn between_processes(mut journey: Journey, narrator: Narrator) -> Result<DemoReports> {
    let heartbeats = |journey: &Journey| -> Result<Tick> {
        for _ in 0..SHOWN {
            let tick = |line: &str| Tick::parse(line).map(|_| line.to_owned());
            let output = journey.vm.process.stdout();
            let line = output.wait("a heartbeat", output.mark(), PATIENCE, tick)?;
            narrator.print(format_args!("  process {} | {line}", journey.vm.process.id()));
        }
        journey.vm.next_tick()
    };
    journey.reset_gap()?;
    let before = heartbeats(&journey)?;
    narrator.print("Moving it to a second process, at 150 MiB/s; the guest dirties more than that…");
    let pictures = root()?.join("target/demo");
    std::fs::create_dir_all(&pictures).with_context(|| format!("cannot create {}", pictures.display()))?;
    let (trace, picture) = (pictures.join("trace.ndjson"), pictures.join("report.html"));
    journey.reset_gap()?;
    let first = watched_move(&mut journey, &trace)?;
    let after = heartbeats(&journey)?;
    narrator.print(compared(&first, before, after)?);
    narrator.print(DIGESTS);
    let verified = journey.hop(&[&PROMISE[..], &["--verify"]].concat())?;
    narrator.print(equal(&verified)?);
    let pages = journey.verify()?;
    narrator.print(format_args!(
        "The guest has checked {pages} pages of its own: no error."
    ));
    check_ticks(&journey.life()?, None)?;
    journey
        .host
        .godwit([
            OsStr::new("report"),
            trace.as_os_str(),
            OsStr::new("--output"),
            picture.as_os_str(),
        ])?
        .expect_code(0)?;
    journey.end()?;
    narrator.print("The guest has powered itself off.");
    narrator.print(format_args!(
        "A picture of the first move is in {}.",
        picture.display()
    ));
    Ok(DemoReports { first, verified })
}

/// The move with its bar on stderr and its course in the file `trace`.
fn watched_move(journey: &mut Journey, trace: &Path) -> Result<Report> {
    let (receiver, endpoint) = journey.receiver("tcp:127.0.0.1:0")?;
    let migrate = journey
        .host
        .command(["migrate", &journey.vm.name, &endpoint, "--json"])
        .args(PROMISE)
        .arg("--trace")
        .arg(trace)
        // The bar is drawn where there is a terminal.
        .stderr(Stdio::inherit())
        .output()
        .context("godwit migrate")?;
    let finished = Finished {
        code: migrate.status.code(),
        stdout: String::from_utf8(migrate.stdout)?,
        stderr: String::new(),
    };
    let report = Migration::of(finished)?.moved()?;
    journey.arrive(receiver)?;
    Ok(report)
}

/// The move by the report and by the guest's clock, in a sentence. An error if the guest did not go on.
fn compared(report: &Report, before: Tick, after: Tick) -> Result<String> {
    ensure!(
        after.n > before.n && after.us > before.us,
        "the heartbeat went from {before:?} to {after:?}"
    );
    ensure!(
        after.pages > before.pages,
        "no page was dirtied between {before:?} and {after:?}"
    );
    let downtime = report.downtime_ms.context("no downtime in the report")?;
    let gap = |tick: Tick| tick.max_gap_us as f64 / 1e3;
    Ok(format!(
        "The guest's heart beats on: beat {} before the move, beat {} after it.\n\
         The reported downtime is {downtime:.0} ms. The longest gap between two beats, by the guest's own clock, was {:.0} ms \
         before the move and {:.0} ms with it; they come every {BEAT_MS} ms, or later while the guest is busy.",
        before.n,
        after.n,
        gap(before),
        gap(after)
    ))
}

/// That the digests of a move are equal, in a sentence.
fn equal(report: &Report) -> Result<String> {
    let digest = report.memory_digest.as_ref().context("no digest in the report")?;
    ensure!(digest.source == digest.destination, "digests differ: {digest:?}");
    Ok(format!("All memory is equal on both sides: {}.", digest.source))
}

/// A tool of the administrator's, which need not be in a user's path.
fn administration(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env(
        "PATH",
        format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()),
    );
    command
}
