//! Memory that the host below this machine has at hand.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use memmap2::{Advice, MmapMut};
use rustix::system::sysinfo;

/// MiB that programs need besides the guest's memory.
pub(crate) const RESERVE_MIB: u64 = 1 << 10;
/// So many MiB are given back at a time.
const PIECE_MIB: u64 = 32;
/// Bytes that may lie free for the next allocation. A host that lends its memory takes back at once what is much more.
const AHEAD: u64 = 256 << 20;
/// How often the thread checks how much of that is left: the fastest program needs ten times as long to take it.
const STEP: Duration = Duration::from_millis(3);

/// Memory for a program that needs it soon. A host that lends its memory takes back what lies idle, and getting it
/// again costs ten times what a page fault costs otherwise. So this process touches and holds it, and gives it back bit
/// by bit while that program takes it.
pub(crate) struct Warm {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Warm {
    /// Touches so many MiB, or as many as leave room for as much again: monitors refuse a guest that there is no room for.
    /// Programs that allocate memory get them, until this is dropped.
    pub(crate) fn lend(mib: u64) -> Result<Self> {
        let mib = mib.min(available_mib()?.saturating_sub(mib + RESERVE_MIB));
        let pieces = (0..mib.div_ceil(PIECE_MIB)).map(|_| touched());
        let pieces: Vec<MmapMut> = pieces.collect::<Result<_>>()?;
        let most = free_memory() + AHEAD;
        let (end, ended) = channel();
        Ok(Self {
            end: Some(end),
            thread: Some(std::thread::spawn(move || give_back(pieces, most, &ended))),
        })
    }
}

/// A piece in the huge pages that a monitor asks for as well: memory that was given back in small pages is found
/// last by a program that wants huge ones.
fn touched() -> Result<MmapMut> {
    let piece = MmapMut::map_anon((PIECE_MIB << 20) as usize).context("memory to lend")?;
    piece.advise(Advice::HugePage)?;
    piece.advise(Advice::PopulateWrite)?;
    Ok(piece)
}

/// Keeps so many bytes free, as long as there are pieces.
fn give_back(mut pieces: Vec<MmapMut>, most: u64, ended: &Receiver<()>) {
    loop {
        while free_memory() + (PIECE_MIB << 20) <= most {
            if pieces.pop().is_none() {
                return;
            }
        }
        if ended.recv_timeout(STEP) == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}

/// MiB that the host can give to programs.
pub(crate) fn available_mib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.map(|kib| kib >> 10)
        .context("/proc/meminfo has no MemAvailable")
}

/// Bytes.
fn free_memory() -> u64 {
    let info = sysinfo();
    info.freeram * u64::from(info.mem_unit)
}

impl Drop for Warm {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // It cannot panic, and if it did there is nothing left to do.
            let _ = thread.join();
        }
    }
}
