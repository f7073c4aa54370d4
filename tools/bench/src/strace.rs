//! The calls that a process makes to KVM about its memory, as the kernel's tracer sees them from outside.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::process::Command;

use ::tests::{PATIENCE, TestProcess};
use anyhow::{Context, Result};
use rustix::process::Signal;
use tempfile::TempDir;

/// The call, and the flag that turns a region's dirty log on.
const CALL: &str = "KVM_SET_USER_MEMORY_REGION";
const LOGS: &str = "KVM_MEM_LOG_DIRTY_PAGES";

/// A tracer at work.
pub(crate) struct Strace {
    process: TestProcess,
    traces: Traces,
}

/// A place for what a tracer sees, with one file for each thread: in a common one, calls of different threads cut each
/// other in two.
pub(crate) struct Traces(TempDir);

/// One call that sets a memory region.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SetRegion {
    /// When it was made, in seconds.
    pub(crate) at: f64,
    /// The region's slot.
    pub(crate) slot: u32,
    /// Whether its writes are logged from then on.
    pub(crate) logged: bool,
    /// How long it took, in milliseconds.
    pub(crate) ms: f64,
}

impl Traces {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    /// The tracer with its options; what it traces follows.
    pub(crate) fn tracer(&self) -> Vec<OsString> {
        let mut tracer: Vec<OsString> = ["strace", "-ff", "-ttt", "-T", "-e", "trace=ioctl", "-o"]
            .map(OsString::from)
            .to_vec();
        tracer.push(self.0.path().join("thread").into());
        tracer
    }

    /// The calls in the order in which they were made.
    pub(crate) fn calls(&self) -> Result<Vec<SetRegion>> {
        let mut calls = Vec::new();
        for file in std::fs::read_dir(self.0.path())? {
            let text = std::fs::read_to_string(file?.path()).context("strace's output")?;
            calls.extend(text.lines().filter_map(SetRegion::parse));
        }
        calls.sort_by(|a, b| a.at.total_cmp(&b.at));
        Ok(calls)
    }
}

impl Strace {
    /// Attaches to a process and all its threads.
    pub(crate) fn attach(pid: u32) -> Result<Self> {
        let traces = Traces::new()?;
        let tracer = traces.tracer();
        let mut command = Command::new(&tracer[0]);
        command.args(&tracer[1..]).args(["-p", &pid.to_string()]);
        let process = TestProcess::spawn(command)?;
        let attached = |line: &str| line.contains(" attached").then_some(());
        process.stderr().wait("strace", 0, PATIENCE, attached)?;
        Ok(Self { process, traces })
    }

    /// Detaches, and returns the calls in the order in which they were made.
    pub(crate) fn finish(mut self) -> Result<Vec<SetRegion>> {
        // It may have ended with the process.
        self.process.signal(Signal::INT)?;
        self.process.wait(PATIENCE)?;
        self.traces.calls()
    }
}

impl SetRegion {
    fn parse(line: &str) -> Option<Self> {
        let (at, call) = line.trim_end().split_once(' ')?;
        let (_, arguments) = call.split_once(CALL)?;
        let (_, slot) = arguments.split_once("slot=")?;
        let slot = slot.split(|c: char| !c.is_ascii_digit()).next()?;
        let (_, took) = arguments.strip_suffix('>')?.rsplit_once('<')?;
        Some(Self {
            at: at.parse().ok()?,
            slot: slot.parse().ok()?,
            logged: arguments.contains(LOGS),
            ms: took.parse::<f64>().ok()? * 1e3,
        })
    }
}

/// The slots whose writes are still logged after these calls.
pub(crate) fn logged_slots(calls: &[SetRegion]) -> Vec<u32> {
    let last: BTreeMap<u32, bool> = calls.iter().map(|call| (call.slot, call.logged)).collect();
    last.into_iter()
        .filter_map(|(slot, logged)| logged.then_some(slot))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(at: &str, slot: u32, flags: &str) -> String {
        format!(
            "{at} ioctl(7, KVM_SET_USER_MEMORY_REGION, {{slot={slot}, flags={flags}, guest_phys_addr=0, memory_size=4096, \
             userspace_addr=0x7f00}}) = 0 <0.000250>"
        )
    }

    #[test]
    fn calls_are_read() {
        let call = SetRegion::parse(&line("17.5", 3, LOGS)).unwrap();
        assert_eq!(
            call,
            SetRegion {
                at: 17.5,
                slot: 3,
                logged: true,
                ms: 0.25
            }
        );
        assert_eq!(SetRegion::parse("17.5 ioctl(9, KVM_RUN, 0) = 0 <0.5>"), None);
        assert_eq!(SetRegion::parse(""), None);
    }

    #[test]
    fn the_last_call_of_a_slot_counts() {
        let calls = [("1", 0, LOGS), ("2", 1, LOGS), ("3", 0, "0")];
        let calls = calls.map(|(at, slot, flags)| SetRegion::parse(&line(at, slot, flags)).unwrap());
        assert_eq!(logged_slots(&calls), [1]);
        assert_eq!(logged_slots(&[]), [0; 0]);
    }
}
