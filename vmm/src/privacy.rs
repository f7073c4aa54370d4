//! Keeps a guest's memory from other processes: it is neither in a core dump nor readable through `/proc` or ptrace.

use anyhow::Context;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::memory;

/// Keeps other processes of the same user out of this one's memory, and this one's memory out of core dumps, from here
/// on (prctl(2), PR_SET_DUMPABLE). To be called before there is a guest.
pub fn keep_memory_private() -> anyhow::Result<()> {
    // A process that is not dumpable has no access to its own page map either, unless it is root.
    memory::open_page_map()?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("PR_SET_DUMPABLE")
}
