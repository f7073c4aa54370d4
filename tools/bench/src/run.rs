//! The whole bench: which experiments the wanted rows need, and the rows that come out.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use ::tests::Fixtures;
use anyhow::{Context, Result, bail};

use crate::bench::{Bench, print_status};
use crate::catalogue::ROWS;
use crate::row::{Definition, Figure, Row};

/// What to measure.
#[derive(Clone, Debug, Default)]
pub struct RowSelection {
    /// Names of rows; all of them if there are none.
    pub rows: Vec<String>,
    /// How often to repeat everything, instead of as often as each row promises.
    pub count: Option<u32>,
    /// Where the report of every move goes, a line each.
    pub reports: Option<PathBuf>,
}

/// Measures the wanted rows, in the order of [`ROWS`]. Says on stderr how far it is. An experiment that fails
/// leaves its rows without a value; the others are measured all the same.
///
/// `iperf3`, `qemu-system-x86_64` and `strace` must be installed. Everything is measured on this machine, which
/// should do nothing else meanwhile.
pub fn run(fixtures: Fixtures, options: &RowSelection) -> Result<Vec<Row>> {
    let wanted = wanted(&options.rows)?;
    let mut experiments: Vec<_> = wanted.iter().map(|row| row.experiment).collect();
    experiments.sort();
    experiments.dedup();
    let mut bench = Bench::new(fixtures, options.count)?;
    let mut figures: Vec<Figure> = Vec::new();
    let began = Instant::now();
    for experiment in experiments {
        let names: Vec<_> = wanted
            .iter()
            .filter(|row| row.experiment == experiment)
            .map(|row| row.name)
            .collect();
        print_status(format_args!("== {}", names.join(", ")));
        let began = Instant::now();
        bench.begin(experiment.spare_seconds());
        match experiment.run(&mut bench, &names) {
            Ok(found) => figures.extend(found),
            Err(error) => print_status(format_args!("FAILED: {}: {error:#}", names.join(", "))),
        }
        print_status(format_args!("== {:.0} s", began.elapsed().as_secs_f64()));
    }
    print_status(format_args!(
        "{:.0} s in all; {}",
        began.elapsed().as_secs_f64(),
        bench.stalls()
    ));
    if let Some(path) = &options.reports {
        let mut file = File::create(path).with_context(|| path.display().to_string())?;
        for report in &bench.moves {
            writeln!(file, "{}", serde_json::to_string(report)?)?;
        }
    }
    let figure = |name: &str| figures.iter().copied().find(|figure| figure.name == name);
    Ok(wanted.iter().map(|row| row.row(figure(row.name))).collect())
}

fn wanted(names: &[String]) -> Result<Vec<&'static Definition>> {
    if let Some(unknown) = names.iter().find(|name| ROWS.iter().all(|row| row.name != *name)) {
        bail!(
            "no row is called {unknown:?}; there are {}",
            ROWS.map(|row| row.name).join(", ")
        );
    }
    let chosen = |row: &&Definition| names.is_empty() || names.iter().any(|name| name == row.name);
    Ok(ROWS.iter().filter(chosen).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_name() {
        assert_eq!(wanted(&[]).unwrap().len(), ROWS.len());
        let two = wanted(&["rss-overhead-mib".into(), "idle-downtime-ms".into()]).unwrap();
        assert_eq!(
            two.iter().map(|row| row.name).collect::<Vec<_>>(),
            ["idle-downtime-ms", "rss-overhead-mib"]
        );
        let error = wanted(&["speed".into()]).unwrap_err().to_string();
        assert!(
            error.contains("\"speed\"") && error.contains("cancel-ms-max"),
            "{error}"
        );
    }
}
