//! `balloon`: memory that a guest gives up.

use api::client::Client;
use api::rundir;
use api::{BalloonStatistics, BalloonUpdate};
use hyper::Method;
use output::print;

use super::client::{block_on, json_line};
use crate::Exit;
use crate::args::BalloonArgs;
use crate::report::figures::bytes;

pub(super) fn run(args: &BalloonArgs) -> anyhow::Result<Exit> {
    let client = Client::new(&rundir::resolve(&args.vm)?);
    let statistics: BalloonStatistics = block_on(async {
        if let Some(amount_mib) = args.target_mib {
            let update = BalloonUpdate { amount_mib };
            client.send_json(Method::PATCH, "/balloon", &update).await?;
        }
        client.get("/balloon/statistics").await
    })??;
    print(&if args.json {
        json_line(&statistics)?
    } else {
        format!("{}\n", summary(&args.vm, &statistics))
    });
    Ok(Exit::Done)
}

fn summary(vm: &str, statistics: &BalloonStatistics) -> String {
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
