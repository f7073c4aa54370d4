//! How fast this machine's time stamp counter runs, which hosts see as it is.
//!
//! A host's kernel that measures it by itself, while it starts, is wrong where QEMU does not get its share of the CPU
//! just then: its clock ran seven times too fast.

#![allow(unsafe_code, reason = "RDTSC")]

use std::arch::x86_64::_rdtsc;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

/// For how long it is watched. A host corrects an error below 1 % by itself.
const SPAN: Duration = Duration::from_millis(20);
/// Readings of counter and clock, of which the one that took the least time is used.
const LOOKS: usize = 16;

/// In kHz, against the system's clock.
pub(crate) fn khz() -> u32 {
    static KHZ: OnceLock<u32> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let (began, first) = read_clocks();
        thread::sleep(SPAN);
        let (ended, last) = read_clocks();
        let ticks = u128::from(last.wrapping_sub(first)) * 1_000_000;
        u32::try_from(ticks / (ended - began).as_nanos()).unwrap_or(u32::MAX)
    })
}

/// The time, and the counter at that time.
fn read_clocks() -> (Instant, u64) {
    let looks = (0..LOOKS).map(|_| {
        let before = Instant::now();
        // SAFETY: no system that runs this forbids it to programs.
        let counter = unsafe { _rdtsc() };
        let took = before.elapsed();
        (took, before + took / 2, counter)
    });
    let best = looks.min_by_key(|(took, ..)| *took);
    best.map_or_else(|| (Instant::now(), 0), |(_, at, counter)| (at, counter))
}
