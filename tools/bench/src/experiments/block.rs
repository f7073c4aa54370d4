//! How fast a guest that polls reads from its disk, beside QEMU's.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use tests::{GuestEvent, PATIENCE, TestOutput, TestProcess};

use crate::bench::{Bench, print_status};
use crate::godwit::Godwit;
use crate::guest::BenchGuest;
use crate::qemu::QemuJourney;
use crate::row::Figure;
use crate::sentinel::Window;
use crate::stats::median;

const ROW: &str = "block-read-vs-qemu";
const MEMORY_MIB: u64 = 64;
/// All of it stays in the page cache.
const DISK_BYTES: u64 = 256 << 20;
const DEPTH: u32 = 32;
const RUNS: u32 = 9;
/// Microseconds of the guest's clock that one run lasts.
const RUN_US: u64 = 1_000_000;
/// QEMU's ways of reading a file that is in the page cache; native AIO is not for that.
const ENGINES: [(&str, bool); 4] = [
    ("io_uring", false),
    ("io_uring", true),
    ("threads", false),
    ("threads", true),
];

/// A monitor whose guest reads, and how fast it was.
struct BlockContender {
    name: String,
    monitor: Monitor,
    rates: Vec<f64>,
}

enum Monitor {
    Godwit(Godwit),
    Qemu(QemuJourney),
}

/// Lets all of them read from one file, in turns.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let directory = TempDir::with_prefix("godwit-bench-")?;
    let disk = directory.path().join("disk");
    let mut contenders = start(bench, &disk)?;
    let turns = contenders.len();
    for run in 0..bench.count(RUNS) as usize {
        // Each run begins with another contender.
        for turn in 0..turns {
            let contender = &mut contenders[(turn + run) % turns];
            let what = format!("reads, {}", contender.name);
            let process = contender.monitor.process();
            contender.monitor.thaw()?;
            let rate = bench.clean(&what, |_| {
                let (rate, window) = Window::of(|| reads_per_s(process.stdout()));
                let rate = rate?;
                print_status(format_args!("{what}: {:.1} thousand a second", rate / 1e3));
                Ok((rate, window))
            })?;
            contender.monitor.freeze()?;
            contender.rates.push(rate);
        }
    }
    let mut medians = contenders
        .iter()
        .map(|contender| median(contender.rates.iter().map(|rate| rate / 1e3)));
    let ours = medians.next().flatten();
    let best = medians.flatten().reduce(f64::max);
    Ok(vec![Figure::beside(ROW, ours, best)])
}

/// Makes the disk, and guests that may only read it, godwit's first; all of them stand still.
fn start(bench: &Bench, disk: &Path) -> Result<Vec<BlockContender>> {
    let fixtures = &bench.fixtures;
    let guest = BenchGuest {
        reads: DEPTH,
        tick_ms: 100,
        ..BenchGuest::idle(MEMORY_MIB)
    };
    let path = disk.to_str().context("a path that is no UTF-8")?;
    std::fs::File::create(disk)?.set_len(DISK_BYTES)?;
    // A guest that can write its disk stamps all of it before it is ready.
    Godwit::start(fixtures, guest, &["--disk", &format!("id=d,path={path}")])?;
    let godwit = Godwit::start(fixtures, guest, &["--disk", &format!("id=d,path={path},ro")])?;
    let mut contenders = vec![BlockContender::new("godwit".into(), Monitor::Godwit(godwit))?];
    for (engine, thread) in ENGINES {
        let qemu = QemuJourney::start(fixtures, guest, &disk_arguments(path, engine, thread))?;
        let name = format!("QEMU, aio={engine}{}", if thread { ", iothread" } else { "" });
        contenders.push(BlockContender::new(name, Monitor::Qemu(qemu))?);
    }
    Ok(contenders)
}

/// QEMU's options for the disk. It does without locks: its own would be in the way of godwit's, which cover the whole
/// file.
fn disk_arguments(path: &str, engine: &str, thread: bool) -> Vec<String> {
    let file = format!("file.filename={path},file.locking=off,format=raw,read-only=on");
    let drive = format!("if=none,id=d,{file},cache=writeback,aio={engine}");
    let device = if thread { ",iothread=io" } else { "" };
    let mut arguments = vec![
        "-drive".to_owned(),
        drive,
        "-device".to_owned(),
        format!("virtio-blk-device,drive=d{device}"),
        "-global".to_owned(),
        "virtio-mmio.force-legacy=false".to_owned(),
    ];
    if thread {
        arguments.extend(["-object".to_owned(), "iothread,id=io".to_owned()]);
    }
    arguments
}

/// Reads per second of the guest's own clock.
fn reads_per_s(output: &TestOutput) -> Result<f64> {
    let tick = |line: &str| GuestEvent::named(line, "tick");
    let next = || output.wait("a tick", output.mark(), PATIENCE, tick);
    // What a guest that stood still prints first may be from before.
    next()?;
    let from = next()?;
    let (from_us, from_reads) = (from.number("us")?, from.number("reads")?);
    let late =
        |line: &str| tick(line).filter(|tick| tick.number("us").is_ok_and(|us| us >= from_us + RUN_US));
    let to = output.wait("a second of ticks", output.mark(), PATIENCE, late)?;
    ensure!(
        to.number("errors")? == 0,
        "the guest read something wrong: {to:?}"
    );
    let (us, reads) = (to.number("us")? - from_us, to.number("reads")? - from_reads);
    Ok(reads as f64 * 1e6 / us as f64)
}

impl BlockContender {
    fn new(name: String, monitor: Monitor) -> Result<Self> {
        monitor.freeze()?;
        Ok(Self {
            name,
            monitor,
            rates: Vec::new(),
        })
    }
}

impl Monitor {
    fn process(&self) -> &TestProcess {
        match self {
            Self::Godwit(godwit) => godwit.process(),
            Self::Qemu(qemu) => qemu.process(),
        }
    }

    fn freeze(&self) -> Result<()> {
        match self {
            Self::Godwit(godwit) => godwit.freeze(),
            Self::Qemu(qemu) => qemu.freeze(),
        }
    }

    fn thaw(&self) -> Result<()> {
        match self {
            Self::Godwit(godwit) => godwit.thaw(),
            Self::Qemu(qemu) => qemu.thaw(),
        }
    }
}
