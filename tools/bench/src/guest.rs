//! The guest of every measurement, under either monitor: the one without Linux, and what it prints.

use ::tests::{Fixtures, GuestEvent, PATIENCE, TestOutput, TestProcess, Tick};
use anyhow::{Context, Result};

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;

/// How fast the guest dirties its working set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BenchRate {
    /// Not at all.
    Idle,
    /// Bytes of dirtied pages per second.
    BytesPerSecond(u64),
    /// As fast as it can.
    Max,
}

/// A bare guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BenchGuest {
    /// Number of vCPUs; under QEMU it has one.
    pub(crate) cpus: u32,
    /// Memory in MiB.
    pub(crate) memory_mib: u64,
    /// What it dirties, in MiB, in order and over again; 0: all of its memory.
    pub(crate) workset_mib: u64,
    /// How fast.
    pub(crate) rate: BenchRate,
    /// Milliseconds between two ticks.
    pub(crate) tick_ms: u64,
    /// Whether all of its memory is filled with what is neither zero nor compressible, and not only its working set.
    pub(crate) fill: bool,
    /// Pages that it reads from its disk at a time; 0: it has none.
    pub(crate) reads: u32,
}

impl BenchGuest {
    /// A guest that does nothing.
    pub(crate) fn idle(memory_mib: u64) -> Self {
        Self {
            cpus: 1,
            memory_mib,
            workset_mib: 16,
            rate: BenchRate::Idle,
            tick_ms: 50,
            fill: true,
            reads: 0,
        }
    }

    /// A guest that dirties 512 MiB over and over.
    pub(crate) fn busy(memory_mib: u64, rate: BenchRate) -> Self {
        Self {
            cpus: 1,
            memory_mib,
            workset_mib: 512,
            rate,
            tick_ms: 50,
            fill: true,
            reads: 0,
        }
    }

    /// Its kernel command line. `tsc_khz` spares the guest a measurement that is only as good as its host is idle.
    pub(crate) fn cmdline(&self, fixtures: &Fixtures) -> Result<String> {
        let tsc_khz = fixtures.probe()?["tsc_khz"].as_u64();
        let tsc_khz = tsc_khz.context("the probe knows no TSC frequency")?;
        let Self {
            cpus,
            workset_mib,
            tick_ms,
            fill,
            reads,
            ..
        } = *self;
        let rate = match self.rate {
            BenchRate::Idle => "0".into(),
            BenchRate::BytesPerSecond(bytes) => bytes.to_string(),
            BenchRate::Max => "max".into(),
        };
        let workset = match workset_mib {
            0 => String::new(),
            mib => format!(" workset={mib}M"),
        };
        Ok(format!(
            "cpus={cpus} fill={} rate={rate} reads={reads} tick={tick_ms} tsc_khz={tsc_khz}{workset}",
            u8::from(fill)
        ))
    }

    /// Pages of its working set.
    pub(crate) fn workset_pages(&self) -> u64 {
        let mib = if self.workset_mib == 0 {
            self.memory_mib
        } else {
            self.workset_mib
        };
        mib * (1 << 20) / PAGE
    }

    /// Waits until it has gone through its whole working set from now on: then every page of it is mapped,
    /// which costs far more for the first time than later.
    pub(crate) fn settle(&self, process: &TestProcess) -> Result<Tick> {
        let first = next_tick(process.stdout())?;
        if self.rate == BenchRate::Idle {
            return Ok(first);
        }
        let goal = first.pages + self.workset_pages();
        let reached = |line: &str| Tick::parse(line).filter(|tick| tick.pages >= goal);
        let mark = process.stdout().mark();
        process
            .stdout()
            .wait("a sweep of the working set", mark, PATIENCE, reached)
    }
}

/// Waits until a guest that was just started works.
pub(crate) fn wait_ready(process: &TestProcess) -> Result<()> {
    let output = process.stdout();
    output.wait("bare: ready", 0, PATIENCE, |line| {
        GuestEvent::named(line, "ready")
    })?;
    next_tick(output).map(|_| ())
}

/// The next whole tick from now on.
pub(crate) fn next_tick(output: &TestOutput) -> Result<Tick> {
    output.wait("a tick", output.mark(), PATIENCE, Tick::parse)
}

/// Makes the guest forget its longest gap.
pub(crate) fn reset_gap(process: &mut TestProcess) -> Result<()> {
    let mark = process.stdout().mark();
    process.send(b"r")?;
    process
        .stdout()
        .wait("reset", mark, PATIENCE, |line| GuestEvent::named(line, "reset"))?;
    Ok(())
}

/// The longest gap, in milliseconds, that a guest that has just arrived has seen since it was made to forget.
/// Its first whole tick may have been made before the pause and printed after it.
pub(crate) fn gap_after_arrival(process: &TestProcess) -> Result<f64> {
    process.stdout().wait("a tick", 0, PATIENCE, Tick::parse)?;
    Ok(next_tick(process.stdout())?.max_gap_us as f64 / 1e3)
}

/// All whole ticks of an output.
pub(crate) fn ticks(output: &TestOutput) -> Vec<Tick> {
    let text = output.text();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().filter_map(Tick::parse).collect()
}

/// Pages per second from one tick to another; nothing if they are the same.
pub(crate) fn pages_per_s(from: &Tick, to: &Tick) -> Option<f64> {
    let us = to.us.checked_sub(from.us).filter(|us| *us > 0)?;
    Some(to.pages.saturating_sub(from.pages) as f64 * 1e6 / us as f64)
}

/// Pages that the guest had dirtied at a time of its own clock, between two ticks in proportion; nothing if it
/// is outside of all ticks.
pub(crate) fn pages_at(ticks: &[Tick], us: f64) -> Option<f64> {
    let after = ticks.iter().position(|tick| tick.us as f64 >= us)?;
    let to = ticks[after];
    if to.us as f64 == us {
        return Some(to.pages as f64);
    }
    let from = ticks[after.checked_sub(1)?];
    let part = (us - from.us as f64) / (to.us - from.us) as f64;
    Some(from.pages as f64 + part * (to.pages - from.pages) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tick(us: u64, pages: u64) -> Tick {
        Tick {
            n: 0,
            us,
            max_gap_us: 0,
            pages,
            errors: 0,
        }
    }

    #[test]
    fn rates_and_pages_between_ticks() {
        let ticks = [tick(1_000_000, 100), tick(2_000_000, 300), tick(4_000_000, 300)];
        assert_eq!(pages_per_s(&ticks[0], &ticks[1]), Some(200.0));
        assert_eq!(pages_per_s(&ticks[1], &ticks[1]), None);
        assert_eq!(pages_at(&ticks, 1_000_000.0), Some(100.0));
        assert_eq!(pages_at(&ticks, 1_500_000.0), Some(200.0));
        assert_eq!(pages_at(&ticks, 3_000_000.0), Some(300.0));
        assert_eq!(pages_at(&ticks, 999_999.0), None);
        assert_eq!(pages_at(&ticks, 4_000_001.0), None);
    }
}
