//! Waiting for what nothing tells by itself.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::PATIENCE;

/// Looks again and again until something holds.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while !holds()? {
        ensure!(Instant::now() < until, "waited for {what}");
        sleep(Duration::from_millis(10));
    }
    Ok(())
}
