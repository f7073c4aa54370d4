//! `cargo xtask demo`: a Debian guest moves under load, and nothing is lost.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use ::lab::Lab;
use anyhow::{Context, Result, ensure};
use migration::Report;
use tests::{
    Event, Finished, Fixtures, Host, Journey, LabJourney, Migration, PATIENCE, StockGuest, Tick, TinyGuest,
    check_ticks, payload,
};

use crate::runner::prepare;
use crate::workspace::{output, root};

/// Heartbeats that are shown before the move and after it.
const SHOWN: usize = 3;
/// Bytes of the disk that both hosts see.
const DISK_BYTES: u64 = 64 << 20;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Print nothing but the migration's report on stdout, as one JSON object
    #[arg(long)]
    json: bool,
}

/// Tells what happens: on stdout, or on stderr where stdout is for the report alone.
#[derive(Clone, Copy)]
struct Teller {
    json: bool,
}

impl Teller {
    fn tell(self, what: impl std::fmt::Display) {
        if self.json {
            eprintln!("{what}")
        } else {
            println!("{what}")
        }
    }
}

/// Sets up, chooses a lane, shows the move. An error if anything is not as promised.
pub(crate) fn run(options: &Options) -> Result<()> {
    let teller = Teller { json: options.json };
    let prepared = prepare()?;
    let fixtures = Fixtures {
        godwit: prepared.godwit,
        guests: prepared.guests,
    };
    let kvm = fixtures.probe()?["kvm"].as_str().unwrap_or("none").to_owned();
    let report = match kvm.as_str() {
        "hardware" => {
            teller.tell("KVM here runs guest kernels natively: a Debian guest moves between two processes of this machine.");
            stock_here(&fixtures, teller)?
        }
        "pvm" => {
            teller.tell(
                "KVM here is kvm-pvm, which interprets guest kernels instruction by instruction: a small Linux made for \
                 that moves between two processes of this machine.",
            );
            tiny_here(&fixtures, teller)?
        }
        _ => {
            teller.tell(
                "There is no usable KVM here: a Debian guest moves between two emulated hosts with their own KVM.",
            );
            teller.tell("Emulation is slow, so the times below are not godwit's; what they add up to is.");
            in_lab(&fixtures, teller)?
        }
    };
    show(&report, teller)?;
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(())
}

/// Between two emulated hosts, memory and a shared disk under load.
fn in_lab(fixtures: &Fixtures, teller: Teller) -> Result<Report> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk");
    std::fs::File::create(&image)?.set_len(DISK_BYTES)?;
    output(administration("mkfs.ext4").args(["-q", "-F"]).arg(&image))?;
    teller.tell("Starting two hosts…");
    let lab = Lab::builder(payload(fixtures))
        .hosts(2)
        .shared_image(&image)
        .start()?;
    teller.tell("Booting the guest on the first: 2 CPUs, 256 MiB, memory and a shared disk under load…");
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
            teller.tell(format_args!("  host {} | {line}", journey.host()));
        }
        journey.tick()
    };
    let before = heartbeats(&mut journey)?;
    teller.tell("Moving it to the second…");
    // Which downtime an emulated host makes of it is left open: it is moved all the same, and the report says so.
    let report = journey.hop(&["--verify", "--on-miss", "switch"])?;
    let after = heartbeats(&mut journey)?;
    let verified = journey.verify()?;
    ensure!(verified.number("errors")? == 0, "the guest found {verified:?}");
    let files = Some(verified.number("files")?);
    conclude(before, after, verified.number("pages")?, files, teller)?;
    journey.power_off()?;
    output(administration("e2fsck").arg("-fn").arg(&image)).context("the guest's file system")?;
    teller.tell("The guest has powered itself off; its file system checks clean.");
    Ok(report)
}

/// A Debian guest between two processes of this machine, memory under load.
fn stock_here(fixtures: &Fixtures, teller: Teller) -> Result<Report> {
    let host = Host::with(fixtures.clone())?;
    let guest = StockGuest::default();
    teller.tell("Booting the guest: 2 CPUs, 256 MiB, memory under load…");
    let vm = host.run("vm-0", guest.options(&fixtures.guests.display().to_string()))?;
    vm.process
        .stdout()
        .wait("agent: ready", 0, PATIENCE, |line| Event::named(line, "ready"))?;
    here(Journey::agent(host, vm), teller)
}

/// The tiny guest in the same way.
fn tiny_here(fixtures: &Fixtures, teller: Teller) -> Result<Report> {
    let guest = TinyGuest {
        workset_mib: 512,
        rate: "200M",
        ..TinyGuest::default()
    };
    teller.tell("Booting the guest: 2 CPUs, 576 MiB, memory under load; this takes half a minute…");
    here(guest.start(Host::with(fixtures.clone())?, &[])?, teller)
}

/// Moves a guest that is up to a second process, over a link that is made slow enough to watch.
fn here(mut journey: Journey, teller: Teller) -> Result<Report> {
    let heartbeats = |journey: &Journey| -> Result<Tick> {
        for _ in 0..SHOWN {
            let tick = |line: &str| Tick::parse(line).map(|_| line.to_owned());
            let output = journey.vm.process.stdout();
            let line = output.wait("a heartbeat", output.mark(), PATIENCE, tick)?;
            teller.tell(format_args!("  process {} | {line}", journey.vm.process.id()));
        }
        journey.vm.next_tick()
    };
    let before = heartbeats(&journey)?;
    teller.tell("Moving it to a second process, at 150 MiB/s; the guest dirties more than that…");
    let pictures = root()?.join("target/demo");
    std::fs::create_dir_all(&pictures).with_context(|| format!("cannot create {}", pictures.display()))?;
    let (trace, picture) = (pictures.join("trace.ndjson"), pictures.join("report.html"));
    let (receiver, endpoint) = journey.receiver("tcp:127.0.0.1:0")?;
    let migrate = journey
        .host
        .command(["migrate", &journey.vm.name, &endpoint, "--json", "--verify"])
        .args([
            "--bandwidth",
            "150MiB/s",
            "--max-downtime",
            "50ms",
            "--deadline",
            "60s",
        ])
        .arg("--trace")
        .arg(&trace)
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
    let after = heartbeats(&journey)?;
    let pages = journey.verify()?;
    conclude(before, after, pages, None, teller)?;
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
    teller.tell(format_args!("A picture of the move is in {}.", picture.display()));
    journey.end()?;
    teller.tell("The guest has powered itself off.");
    Ok(report)
}

/// Checks what was promised, and says it.
fn conclude(before: Tick, after: Tick, pages: u64, files: Option<u64>, teller: Teller) -> Result<()> {
    ensure!(
        after.n > before.n && after.us > before.us,
        "the heartbeat went from {before:?} to {after:?}"
    );
    ensure!(
        after.pages > before.pages,
        "no page was dirtied between {before:?} and {after:?}"
    );
    teller.tell(format_args!(
        "The heartbeat goes on: {} before the move, {} after it.",
        before.n, after.n
    ));
    teller.tell(format_args!(
        "The guest has checked {pages} pages{} of its own: no error. Its longest gap was {:.0} ms.",
        files.map_or_else(String::new, |files| format!(" and {files} files")),
        after.max_gap_us as f64 / 1e3
    ));
    Ok(())
}

fn show(report: &Report, teller: Teller) -> Result<()> {
    let digest = report.memory_digest.as_ref().context("no digest in the report")?;
    ensure!(digest.source == digest.destination, "digests differ: {digest:?}");
    teller.tell(format_args!(
        "All memory was equal on both sides while the guest stood still: {}.",
        digest.source
    ));
    teller.tell("The report of `godwit migrate --json`:");
    if !teller.json {
        println!("{}", serde_json::to_string_pretty(report)?);
    }
    Ok(())
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
