//! Waiting for what no event announces, and how long anything may take.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, bail};
use lab::WaitLimit;

/// How long anything may take before a test gives up. A machine may be slow, so a wait is renewed whenever one of the
/// test's programs, or a program on one of its hosts, prints something: a guest's next tick is enough.
pub const PATIENCE: WaitLimit = WaitLimit::DEFAULT;

/// Between two checks.
const INTERVAL: Duration = Duration::from_millis(10);

/// Checks again and again until something holds.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    wait_for(what, || Ok(holds()?.then_some(())))
}

/// Calls `find` again and again until it finds something, and returns that.
pub fn wait_for<T>(what: &str, mut find: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let mut deadline = PATIENCE.begin();
    loop {
        if let Some(seen) = find()? {
            return Ok(seen);
        }
        if deadline.left().is_none() {
            bail!("waited for {what}");
        }
        sleep(INTERVAL);
    }
}
