//! A guest that reads from its disk all the time, moved while it does.

use anyhow::{Context, Result, ensure};
use tests::{BareGuest, Event, Host, Journey, PATIENCE, Vm, count};

const DISK_BYTES: u64 = 64 << 20;
/// Reads after each move: the disk is read once in the mean.
const READS: u64 = DISK_BYTES >> 12;

/// Waits until the guest has read so many pages more, and returns how many it has read in all.
fn read_on(vm: &Vm, pages: u64) -> Result<u64> {
    let reads = |line: &str| Event::named(line, "tick")?.number("reads").ok();
    let output = vm.process.stdout();
    let first = output.wait("a tick", output.mark(), PATIENCE, reads)?;
    let enough = |line: &str| reads(line).filter(|reads| *reads >= first + pages);
    output.wait("reads from the disk", output.mark(), PATIENCE, enough)
}

#[test]
fn no_read_is_wrong_or_lost_across_moves() -> Result<()> {
    let host = Host::new()?;
    let path = host.path("disk.img");
    std::fs::File::create(&path)?.set_len(DISK_BYTES)?;
    let guest = BareGuest {
        reads: 32,
        ..Default::default()
    };
    let disk = format!("id=d,path={}", path.display());
    let mut journey = Journey::start(host, &guest, &["--disk", &disk])?;
    let mut reads = read_on(&journey.vm, READS)?;
    let disk = format!("d={}", path.display());
    for number in 1..=count(4)? {
        let (receiver, endpoint) = journey.receiver_with("tcp:127.0.0.1:0", &["--disk", &disk])?;
        let moved = journey.hop_to(receiver, &endpoint, &["--verify", "--on-miss", "switch"]);
        moved.with_context(|| format!("move {number}"))?;
        let before = reads;
        reads = read_on(&journey.vm, READS)?;
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
