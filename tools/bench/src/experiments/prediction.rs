//! How well downtime and total time were predicted, over all moves of this bench.

use anyhow::{Result, ensure};
use migration::{IntervalMs, Report};

use super::{budget, idle};
use crate::bench::Bench;
use crate::row::Figure;
use crate::stats::{median, share};

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
        Figure::alone(
            "prediction-downtime-covered",
            share(&bench.moves, downtime_covered),
        ),
        Figure::alone("prediction-total-covered", share(&bench.moves, total_covered)),
        Figure::alone(
            "prediction-downtime-width",
            median(bench.moves.iter().filter_map(downtime_width)),
        ),
        Figure::alone(
            "prediction-total-width",
            median(bench.moves.iter().filter_map(total_width)),
        ),
    ])
}

fn downtime_covered(report: &Report) -> bool {
    covered(report.predicted_downtime_interval_ms, report.downtime_ms)
}

fn total_covered(report: &Report) -> bool {
    covered(report.predicted_total_interval_ms, Some(report.total_ms))
}

/// An interval that was not predicted holds nothing.
fn covered(interval: Option<IntervalMs>, actual: Option<f64>) -> bool {
    let pair = interval.zip(actual);
    pair.is_some_and(|(interval, actual)| (interval.low..=interval.high).contains(&actual))
}

/// Up to 2 ms are narrow enough, however short the downtime was.
fn downtime_width(report: &Report) -> Option<f64> {
    width(
        report.predicted_downtime_interval_ms,
        report.downtime_ms,
        2.0,
        0.5,
    )
}

/// Up to 100 ms are, however short the whole was.
fn total_width(report: &Report) -> Option<f64> {
    width(
        report.predicted_total_interval_ms,
        Some(report.total_ms),
        100.0,
        0.35,
    )
}

/// An interval's width as a part of the actual figure.
fn width(interval: Option<IntervalMs>, actual: Option<f64>, narrow_ms: f64, bar: f64) -> Option<f64> {
    let (IntervalMs { low, high }, actual) = interval.zip(actual)?;
    let part = (high - low) / actual;
    Some(if high - low <= narrow_ms {
        part.min(bar)
    } else {
        part
    })
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

    #[test]
    fn intervals_hold_and_are_narrow() {
        let interval = |low, high| Some(IntervalMs { low, high });
        assert!(covered(interval(1.0, 2.0), Some(2.0)) && !covered(interval(1.0, 2.0), Some(2.1)));
        assert!(!covered(None, Some(1.0)) && !covered(interval(1.0, 2.0), None));
        assert_eq!(width(interval(8.0, 13.0), Some(10.0), 2.0, 0.5), Some(0.5));
        assert_eq!(
            width(interval(0.5, 2.0), Some(1.0), 2.0, 0.5),
            Some(0.5),
            "1.5 ms are narrow"
        );
        assert_eq!(width(interval(0.5, 3.0), Some(1.0), 2.0, 0.5), Some(2.5));
        assert_eq!(width(None, Some(1.0), 2.0, 0.5), None);
    }
}
