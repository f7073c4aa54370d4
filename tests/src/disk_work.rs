//! What a bare guest does with its disk, as it says with each tick.

use anyhow::Result;

use crate::{GuestEvent, PATIENCE, Vm};

/// What it has done so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskWork {
    /// Pages read.
    pub reads: u64,
    /// Requests that ended with an I/O error.
    pub io_errors: u64,
}

impl DiskWork {
    fn parse(line: &str) -> Option<Self> {
        let tick = GuestEvent::named(line, "tick")?;
        Some(Self {
            reads: tick.number("reads").ok()?,
            io_errors: tick.number("io_errors").ok()?,
        })
    }
}

impl Vm {
    /// Waits until the guest has read so many pages more.
    pub fn read_on(&self, pages: u64) -> Result<DiskWork> {
        self.work_on("reads from the disk", |begin, now| {
            now.reads >= begin.reads + pages
        })
    }

    /// Waits until so many requests more have ended with an I/O error.
    pub fn fail_on(&self, requests: u64) -> Result<DiskWork> {
        self.work_on("I/O errors of the disk", |begin, now| {
            now.io_errors >= begin.io_errors + requests
        })
    }

    fn work_on(&self, what: &str, is_enough: impl Fn(DiskWork, DiskWork) -> bool) -> Result<DiskWork> {
        let output = self.process.stdout();
        let begin = output.wait("a tick", output.mark(), PATIENCE, DiskWork::parse)?;
        let enough = |line: &str| DiskWork::parse(line).filter(|now| is_enough(begin, *now));
        output.wait(what, output.mark(), PATIENCE, enough)
    }
}
