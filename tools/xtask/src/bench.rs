//! `cargo xtask bench`: figures, beside those of others.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use tests::Fixtures;

use crate::guests::{self, Artifact};
use crate::packages;
use crate::runner::{has_kvm, prepare};

/// The programs that godwit is compared with, and strace, which counts its system calls.
const PACKAGES: [&str; 3] = ["iperf3", "qemu-system-x86", "strace"];

#[derive(clap::Args)]
pub(crate) struct BenchOptions {
    /// Print nothing but the rows, as one JSON array, on stdout
    #[arg(long)]
    json: bool,
    /// Measure only this row; may be given several times
    #[arg(long = "row", value_name = "NAME")]
    rows: Vec<String>,
    /// Repeat everything so often instead of as often as each row promises: a quick look
    #[arg(long, value_name = "N")]
    count: Option<u32>,
    /// Write the report of every move to this file, a line of JSON each
    #[arg(long, value_name = "FILE")]
    reports: Option<PathBuf>,
    /// List the rows and what they must reach, and measure nothing
    #[arg(long)]
    list: bool,
    /// Measure this program instead of building one
    #[arg(long, value_name = "FILE")]
    godwit: Option<PathBuf>,
}

/// Measures, and prints the rows. A bar that is not reached is no error; a row that could not be measured is.
pub(crate) fn run(options: &BenchOptions) -> Result<()> {
    if options.list {
        for row in &bench::ROWS {
            let peer = row
                .peer
                .map(|peer| format!(" (beside {peer})"))
                .unwrap_or_default();
            println!("{:<34} {}{peer}; {:?}", row.name, row.meaning, row.bar);
        }
        return Ok(());
    }
    if !has_kvm() {
        bail!("this machine has no /dev/kvm: there is nothing to measure");
    }
    packages::ensure(&PACKAGES)?;
    let measured = bench::RowSelection {
        rows: options.rows.clone(),
        count: options.count,
        reports: options.reports.clone(),
    };
    let rows = bench::run(fixtures(options)?, &measured)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print!("{}", bench::table(&rows));
    }
    let missing: Vec<_> = rows
        .iter()
        .filter(|row| row.value.is_none())
        .map(|row| row.name)
        .collect();
    if !missing.is_empty() {
        bail!("not measured: {}", missing.join(", "));
    }
    Ok(())
}

fn fixtures(options: &BenchOptions) -> Result<Fixtures> {
    let Some(godwit) = &options.godwit else {
        let prepared = prepare()?;
        return Ok(Fixtures {
            godwit: prepared.godwit,
            guests: prepared.guests,
        });
    };
    let godwit = godwit
        .canonicalize()
        .with_context(|| format!("{}", godwit.display()))?;
    Ok(Fixtures {
        godwit,
        guests: guests::build(&Artifact::ALL)?,
    })
}
