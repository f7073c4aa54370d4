//! What the CPUs share: the plan, which none changes, and what each shows to the others.

use core::fmt::Write;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use guest_core::{BareSettings, PAGE, Share};

use crate::cpu;
use crate::machine::BareMachine;
use crate::serial::SerialLine;

/// A CPU's phases; every verification adds one.
pub(crate) const ONLINE: u32 = 1;
pub(crate) const FILLED: u32 = 2;

/// What a CPU shows to the others.
pub(crate) struct Cpu {
    pub(crate) phase: AtomicU32,
    pub(crate) pages: AtomicU64,
    /// Pages read from the disk.
    pub(crate) reads: AtomicU64,
    /// Requests that the disk answered with an I/O error, where it may.
    pub(crate) io_errors: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) verified: AtomicU64,
    /// In TSC ticks.
    pub(crate) longest_gap: AtomicU64,
    pub(crate) last_read: AtomicU64,
    /// By how many ticks the TSC went backwards, until it is reported.
    pub(crate) backwards: AtomicU64,
}

impl Cpu {
    const fn new() -> Self {
        Self {
            phase: AtomicU32::new(0),
            pages: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            io_errors: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            verified: AtomicU64::new(0),
            longest_gap: AtomicU64::new(0),
            last_read: AtomicU64::new(0),
            backwards: AtomicU64::new(0),
        }
    }

    /// Reads the TSC and keeps the longest time between two readings.
    pub(crate) fn read_tsc(&self) -> u64 {
        let now = cpu::tsc();
        let last = self.last_read.swap(now, Ordering::Relaxed);
        if now < last {
            self.backwards.store(last - now, Ordering::Relaxed);
        } else if last != 0 && now - last > self.longest_gap.load(Ordering::Relaxed) {
            self.longest_gap.store(now - last, Ordering::Relaxed);
        }
        now
    }
}

pub(crate) static CPUS: [Cpu; BareSettings::MAX_CPUS as usize] =
    [const { Cpu::new() }; BareSettings::MAX_CPUS as usize];

/// What all CPUs share and none changes.
pub(crate) struct BarePlan {
    pub(crate) machine: BareMachine,
    pub(crate) workset: Share,
    pub(crate) rest: Share,
    pub(crate) tsc_khz: u64,
    pub(crate) apic_ticks_per_ms: u32,
    pub(crate) start: u64,
}

impl BarePlan {
    pub(crate) fn new(machine: BareMachine) -> Self {
        let (tsc, apic) = cpu::compare_clocks();
        // Every VMM of the kind runs the APIC timer at 1 GHz; so it measures the TSC if the command line does not say.
        let tsc_khz = machine
            .settings
            .tsc_khz
            .unwrap_or(tsc.saturating_mul(1_000_000) / apic.max(1))
            .max(1);
        let apic_ticks_per_ms = (apic.saturating_mul(tsc_khz) / tsc.max(1)) as u32;
        let all = machine.ranges.pages();
        let count = machine
            .settings
            .workset
            .map_or(all, |bytes| bytes / PAGE)
            .min(all);
        let rest = if machine.settings.fill { all - count } else { 0 };
        Self {
            machine,
            workset: Share { first: 0, count },
            rest: Share {
                first: count,
                count: rest,
            },
            tsc_khz,
            apic_ticks_per_ms,
            start: cpu::tsc(),
        }
    }

    pub(crate) fn cpus(&self) -> &'static [Cpu] {
        &CPUS[..self.machine.settings.cpus as usize]
    }

    pub(crate) fn us(&self, ticks: u64) -> u64 {
        ticks / self.tsc_khz * 1000 + ticks % self.tsc_khz * 1000 / self.tsc_khz
    }

    pub(crate) fn sum(&self, field: impl Fn(&Cpu) -> &AtomicU64) -> u64 {
        self.cpus()
            .iter()
            .map(|cpu| field(cpu).load(Ordering::Relaxed))
            .sum()
    }

    pub(crate) fn longest_gap(&self) -> u64 {
        self.cpus()
            .iter()
            .map(|cpu| cpu.longest_gap.load(Ordering::Relaxed))
            .max()
            .unwrap_or(0)
    }

    /// Whether all CPUs have come to a phase.
    pub(crate) fn all_in(&self, phase: u32) -> bool {
        self.cpus()
            .iter()
            .all(|cpu| cpu.phase.load(Ordering::Acquire) >= phase)
    }
}

/// Prints a line; `cpu` is the one that runs this.
pub(crate) fn print_line(cpu: &Cpu, text: core::fmt::Arguments<'_>) {
    let mut line = SerialLine::new();
    let _ = line.write_fmt(text);
    line.print(|| {
        cpu.read_tsc();
    });
}
