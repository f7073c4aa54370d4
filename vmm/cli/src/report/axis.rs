//! Axes: what they reach from and to, and where their ticks are.

use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::coord::types::RangedCoordf64;

use super::panel::Panel;

/// How an axis is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    /// In powers of 1024.
    Bytes,
    /// In powers of 10.
    Tens,
    /// 0 to 100.
    Percent,
}

/// A value axis: values are drawn at `place(value)`.
pub(super) struct Scale {
    pub(super) log: bool,
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) ticks: Vec<f64>,
}

/// An axis with chosen ticks.
pub(super) struct Axis {
    range: RangedCoordf64,
    ticks: Vec<f64>,
}

impl Axis {
    pub(super) fn new(range: Range<f64>, ticks: Vec<f64>) -> Self {
        Self {
            range: range.into(),
            ticks,
        }
    }
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.range.map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.range()
    }
}

impl Scale {
    pub(super) fn place(&self, value: f64) -> f64 {
        if self.log {
            value.max(self.low).log2()
        } else {
            value
        }
    }
}

/// The axis that shows all series, and the levels that are not far off.
pub(super) fn scale(panel: &Panel) -> Scale {
    if panel.unit == Unit::Percent {
        return Scale {
            log: false,
            low: 0.0,
            high: 100.0,
            ticks: vec![0.0, 50.0, 100.0],
        };
    }
    /// From this ratio on an axis is logarithmic.
    const LOG_FROM: f64 = 40.0;
    if panel.fits_lines {
        return fitted(panel);
    }
    /// A level may stretch an axis by no more than this.
    const STRETCH: f64 = 3.0;
    /// What an axis without values reaches to.
    const PAGE: f64 = 4096.0;
    /// And a logarithmic one downwards by no more than this.
    const DEPTH: f64 = 1e4;
    let values = || {
        let points = panel.series.iter().flat_map(|series| &series.points);
        points.map(|(_, value)| *value).filter(|value| *value > 0.0)
    };
    let most = values().fold(0.0, f64::max);
    let least = values().fold(most, f64::min);
    // What a logarithmic axis would reach down to.
    let depth = panel.levels.iter().map(|level| level.value);
    let least = depth
        .filter(|value| *value >= least / DEPTH)
        .fold(least, f64::min);
    let log = panel.may_be_log && least > 0.0 && most / least >= LOG_FROM;
    let reach = if most > 0.0 { most * STRETCH } else { f64::INFINITY };
    let levels = panel.levels.iter().map(|level| level.value);
    let high = levels.filter(|value| *value <= reach).fold(most, f64::max);
    let nothing = if panel.unit == Unit::Bytes { PAGE } else { 1.0 };
    let high = if high > 0.0 { high * 1.08 } else { nothing };
    if !log {
        return Scale {
            log,
            low: 0.0,
            high,
            ticks: ticks(high, panel.unit, 4),
        };
    }
    let low = least / 1.08;
    Scale {
        log,
        low,
        high,
        ticks: log_ticks(low, high, panel.unit),
    }
}

/// The axis that shows all lines and what they are likely to be between, and of the levels those beside them.
fn fitted(panel: &Panel) -> Scale {
    /// What a line may be between stretches the axis by no more than this part of it.
    const STRETCH: f64 = 0.5;
    /// A line that does not change is shown with this part of its value around it.
    const MARGIN: f64 = 0.05;
    let points = || {
        panel
            .series
            .iter()
            .flat_map(|series| &series.points)
            .map(|(_, value)| *value)
    };
    let (low, high) = points().fold((f64::INFINITY, 0.0_f64), |ends, value| {
        (ends.0.min(value), ends.1.max(value))
    });
    if !low.is_finite() || high <= 0.0 {
        return Scale {
            log: false,
            low: 0.0,
            high: 1.0,
            ticks: ticks(1.0, panel.unit, 4),
        };
    }
    let (least, most) = (low * (1.0 - STRETCH), high * (1.0 + STRETCH));
    let bands = panel.series.iter().flat_map(|series| &series.band);
    let ends = bands.flat_map(|(_, low, high)| [*low, *high]);
    let levels = panel.levels.iter().map(|level| level.value);
    let beside = levels.filter(|value| (least..=most).contains(value));
    let (low, high) = ends.chain(beside).fold((low, high), |(low, high), value| {
        (low.min(value.max(least)), high.max(value.min(most)))
    });
    let margin = ((high - low) * 0.08).max(high * MARGIN);
    let (low, high) = ((low - margin).max(0.0), high + margin);
    let step = step(high - low, panel.unit, 4);
    Scale {
        log: false,
        low,
        high,
        ticks: (0..=6)
            .map(|n| ((low / step).ceil() + f64::from(n)) * step)
            .filter(|tick| *tick <= high)
            .collect(),
    }
}

/// Round numbers from 0 to `high`, no more than `count` after 0.
pub(super) fn ticks(high: f64, unit: Unit, count: u32) -> Vec<f64> {
    let step = step(high, unit, count);
    (0..=count)
        .map(|n| f64::from(n) * step)
        .filter(|tick| *tick <= high)
        .collect()
}

/// A round number of which no more than `count` are in `high`.
fn step(high: f64, unit: Unit, count: u32) -> f64 {
    let mut base = 1.0;
    if unit == Unit::Bytes {
        while high / base >= 1024.0 {
            base *= 1024.0;
        }
    }
    let rough = high / base / f64::from(count);
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= rough)
        .unwrap_or(rough)
        * base
}

/// Powers of 2 or 10 between two values, no more than six of them.
fn log_ticks(low: f64, high: f64, unit: Unit) -> Vec<f64> {
    let base: f64 = if unit == Unit::Bytes { 4.0 } else { 10.0 };
    let exponent = |value: f64| value.ln() / base.ln();
    let (first, end) = (exponent(low).ceil() as i32, exponent(high).floor() as i32);
    let step = ((end - first) / 6 + 1).max(1);
    (first..=end)
        .filter(|n| n.rem_euclid(step) == 0)
        .map(|n| base.powi(n))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::panel::{INK, Level, Series};
    use super::*;

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(
            ticks(8041.0, Unit::Tens, 8),
            [0.0, 2000.0, 4000.0, 6000.0, 8000.0]
        );
        assert_eq!(ticks(100.0, Unit::Tens, 4), [0.0, 50.0, 100.0]);
        const MIB: f64 = 1048576.0;
        assert_eq!(
            ticks(480.0 * MIB, Unit::Bytes, 4),
            [0.0, 200.0 * MIB, 400.0 * MIB]
        );
        assert_eq!(
            log_ticks(3e6, 2.2e9, Unit::Bytes),
            [4.0, 16.0, 64.0, 256.0, 1024.0].map(|n| n * MIB)
        );
        assert_eq!(log_ticks(0.5, 400.0, Unit::Tens), [1.0, 10.0, 100.0]);
        assert!(log_ticks(1e-300, 1e300, Unit::Tens).len() <= 7);
    }

    fn panel(values: &[f64], level: f64) -> Panel {
        Panel {
            title: "t",
            unit: Unit::Tens,
            format: super::super::figures::duration,
            may_be_log: true,
            fits_lines: false,
            series: vec![Series {
                name: "s",
                color: INK,
                points: values.iter().map(|value| (0.0, *value)).collect(),
                band: Vec::new(),
            }],
            levels: vec![Level {
                name: "l".into(),
                color: INK,
                value: level,
            }],
        }
    }

    #[test]
    fn an_axis_is_logarithmic_where_values_differ_much() {
        assert!(!scale(&panel(&[10.0, 20.0, 0.0], 15.0)).log);
        let log = scale(&panel(&[1.0, 1000.0], 50.0));
        assert!(log.log && log.low < 1.0 && log.high > 1000.0);
        // Also where only the level is far below.
        let log = scale(&panel(&[900.0, 1000.0], 5.0));
        assert!(log.log && log.low < 5.0);
    }

    #[test]
    fn a_level_far_off_does_not_flatten_the_lines() {
        assert!(scale(&panel(&[10.0, 20.0], 50.0)).high > 50.0);
        assert!(scale(&panel(&[10.0, 20.0], 5000.0)).high < 30.0);
        assert!(scale(&panel(&[], 5000.0)).high > 5000.0);
    }

    #[test]
    fn an_axis_that_fits_its_lines_shows_them_and_not_a_deadline_far_off() {
        let mut total = panel(&[7900.0, 9100.0, 8000.0], 60_000.0);
        total.fits_lines = true;
        let shown = scale(&total);
        assert!(shown.low > 7000.0 && shown.low < 7900.0, "{}", shown.low);
        assert!(shown.high > 9100.0 && shown.high < 10_000.0, "{}", shown.high);
        assert!(
            shown.ticks.len() >= 2
                && shown
                    .ticks
                    .iter()
                    .all(|tick| (shown.low..=shown.high).contains(tick))
        );
        // What the value is likely to be between is shown as well, but not without bound.
        total.series[0].band = vec![(0.0, 7000.0, 1e9)];
        let shown = scale(&total);
        assert!(
            shown.low < 7000.0 && shown.high > 13_000.0 && shown.high < 15_000.0,
            "{}",
            shown.high
        );
        // Nothing to show, and a line that does not change.
        total.series[0].points.clear();
        assert_eq!(scale(&total).high, 1.0);
        total.series[0].band.clear();
        total.series[0].points = vec![(0.0, 50.0)];
        let shown = scale(&total);
        assert!(shown.low < 50.0 && shown.high > 50.0);
    }
}
