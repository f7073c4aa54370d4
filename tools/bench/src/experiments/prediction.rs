//! How well downtime and total time were predicted, over all moves of this bench.

use anyhow::{Result, ensure};
use migration::Report;

use super::{budget, idle};
use crate::bench::Bench;
use crate::row::Figure;
use crate::stats::share;

/// Judges what the other experiments left; where none ran, makes the moves of two of them.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    if bench.moves.is_empty() {
        idle::run(bench)?;
        budget::run(bench)?;
    }
    ensure!(!bench.moves.is_empty(), "no guest was moved");
    Ok(vec![
        Figure::alone("prediction-downtime-within", share(&bench.moves, downtime_within)),
        Figure::alone("prediction-total-within", share(&bench.moves, total_within)),
    ])
}

/// Within a fifth or 2 ms.
fn downtime_within(report: &Report) -> bool {
    within(report.predicted_downtime_ms, report.downtime_ms, 0.2, 2.0)
}

/// Within 15 % or 50 ms.
fn total_within(report: &Report) -> bool {
    within(report.predicted_total_ms, Some(report.total_ms), 0.15, 50.0)
}

/// A prediction that was not made is wrong.
fn within(predicted: Option<f64>, actual: Option<f64>, part: f64, ms: f64) -> bool {
    let pair = predicted.zip(actual);
    pair.is_some_and(|(predicted, actual)| (predicted - actual).abs() <= ms.max(part * actual))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_enough() {
        assert!(within(Some(12.0), Some(10.0), 0.2, 1.0));
        assert!(!within(Some(12.1), Some(10.0), 0.2, 1.0));
        assert!(within(Some(2.9), Some(1.0), 0.2, 2.0));
        assert!(!within(None, Some(1.0), 0.2, 2.0));
        assert!(!within(Some(1.0), None, 0.2, 2.0));
    }
}
