//! `balloon`: memory that a guest gives up.

use std::io::{self, Write};

use hyper::Method;

use super::Exit;
use super::args::BalloonArgs;
use super::client::block_on;
use crate::api::client::Client;
use crate::api::{BalloonStatistics, BalloonUpdate};
use crate::report::figures::bytes;
use crate::rundir;

pub(super) fn run(args: &BalloonArgs) -> anyhow::Result<Exit> {
    let client = Client::new(&rundir::resolve(&args.vm)?);
    let statistics: BalloonStatistics = block_on(async {
        if let Some(amount_mib) = args.target_mib {
            let update = BalloonUpdate { amount_mib };
            client.send_json(Method::PATCH, "/balloon", &update).await?;
        }
        client.get("/balloon/statistics").await
    })??;
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&statistics)?)?;
    } else {
        writeln!(out, "{}", told(&args.vm, &statistics))?;
    }
    Ok(Exit::Done)
}

fn told(vm: &str, statistics: &BalloonStatistics) -> String {
    let mebibytes = |count: u64| bytes((count << 20) as f64);
    let memory = match (statistics.guest.available_memory, statistics.guest.total_memory) {
        (Some(available), Some(total)) => format!(
            "; {} of its {} are available",
            bytes(available as f64),
            bytes(total as f64)
        ),
        _ => String::new(),
    };
    format!(
        "{vm} has given up {} of {}{memory}",
        mebibytes(statistics.actual_mib),
        mebibytes(statistics.target_mib),
    )
}
