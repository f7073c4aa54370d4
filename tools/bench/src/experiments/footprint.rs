//! Memory of the process besides the guest's own.

use anyhow::{Context, Result};

use crate::bench::{Bench, print_status};
use crate::godwit::Godwit;
use crate::guest::BenchGuest;
use crate::qemu::QemuJourney;
use crate::row::Figure;

const MEMORY_MIB: u64 = 512;

/// Looks at a booted guest under both monitors.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let guest = BenchGuest::idle(MEMORY_MIB);
    let godwit = Godwit::start(&bench.fixtures, guest, &[])?;
    let qemu = QemuJourney::start(&bench.fixtures, guest, &[])?;
    let [ours, theirs] = [godwit.process().id(), qemu.process().id()].map(overhead_mib);
    let (ours, theirs) = (ours?, theirs?);
    print_status(format_args!(
        "resident besides guest memory: godwit {ours:.1} MiB, QEMU {theirs:.1} MiB"
    ));
    Ok(vec![Figure::beside("rss-overhead-mib", Some(ours), Some(theirs))])
}

/// What is resident in all mappings but those of the guest's RAM.
fn overhead_mib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps");
    let smaps = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    overhead_kib(&smaps, MEMORY_MIB << 10)
        .map(|kib| kib / 1024.0)
        .with_context(|| format!("{path}: no guest memory"))
}

/// A mapping of at least half the guest's size is its RAM, whatever the kernel has merged with it.
fn overhead_kib(smaps: &str, ram_kib: u64) -> Option<f64> {
    let number = |line: &str, name: &str| -> Option<u64> {
        line.strip_prefix(name)?
            .trim()
            .strip_suffix(" kB")?
            .trim()
            .parse()
            .ok()
    };
    let (mut overhead, mut ram, mut size) = (0, false, 0);
    for line in smaps.lines() {
        if let Some(kib) = number(line, "Size:") {
            size = kib;
        } else if let Some(kib) = number(line, "Rss:") {
            if size >= ram_kib / 2 && kib >= ram_kib / 2 {
                ram = true;
                overhead += kib.saturating_sub(ram_kib);
            } else {
                overhead += kib;
            }
        }
    }
    ram.then_some(overhead as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_but_the_ram() {
        let mapping =
            |size, rss| format!("7f00-7f01 rw-p 0 00:00 0\nSize: {size} kB\nRss:   {rss} kB\nPss: 9 kB\n");
        let smaps = mapping(100, 50) + &mapping(2060, 2055) + &mapping(8192, 7);
        assert_eq!(overhead_kib(&smaps, 2048), Some(64.0));
        assert_eq!(overhead_kib(&mapping(100, 50), 2048), None);
    }
}
