//! `metrics`: what a VM's devices count.

use std::io::{self, Write};

use super::Exit;
use super::args::OutputArgs;
use super::client::{block_on, connect};
use crate::api::Metrics;

pub(super) fn run(args: &OutputArgs) -> anyhow::Result<Exit> {
    let metrics: Metrics = block_on(connect(&args.vm)?.get("/metrics"))??;
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&metrics)?)?;
        return Ok(Exit::Done);
    }
    for (device, counters) in &metrics.devices {
        writeln!(out, "{device}")?;
        for (name, count) in counters {
            writeln!(out, "  {name:<20} {count:>16}")?;
        }
    }
    Ok(Exit::Done)
}
