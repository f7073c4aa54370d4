//! `metrics`: what a VM's devices count.

use api::Metrics;
use output::print;

use super::client::{block_on, connect, json_line};
use crate::Exit;
use crate::args::OutputArgs;

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
