//! `metrics`: what a VM's devices count.

use super::Exit;
use super::args::OutputArgs;
use super::client::{block_on, connect, json_line};
use crate::api::Metrics;
use crate::output::print;

pub(super) fn run(args: &OutputArgs) -> anyhow::Result<Exit> {
    let metrics: Metrics = block_on(connect(&args.vm)?.get("/metrics"))??;
    print(&if args.json {
        json_line(&metrics)?
    } else {
        table(&metrics)
    });
    Ok(Exit::Done)
}

fn table(metrics: &Metrics) -> String {
    let mut table = String::new();
    for (device, counters) in &metrics.devices {
        table += &format!("{device}\n");
        for (name, count) in counters {
            table += &format!("  {name:<20} {count:>16}\n");
        }
    }
    table
}
