//! The rows: what each means, its bar, and how it is printed.

use std::fmt::Write;

use serde::Serialize;

use crate::experiments::Experiment;

/// What a row's figure is held to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BenchBar {
    /// The value must reach this.
    AtLeast(f64),
    /// The value must not exceed this.
    AtMost(f64),
    /// The ratio must reach this.
    RatioAtLeast(f64),
    /// The ratio must not exceed this.
    RatioAtMost(f64),
    /// Only reported.
    None,
}

/// What a row means.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    /// Its name, for `--row`.
    pub name: &'static str,
    /// What is measured, in one line.
    pub meaning: &'static str,
    /// Unit of the value and of the peer's.
    pub unit: &'static str,
    /// What it is compared with.
    pub peer: Option<&'static str>,
    /// What it must reach.
    pub bar: BenchBar,
    pub(crate) experiment: Experiment,
}

/// One measured row, as `--json` prints it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The definition's name.
    pub name: &'static str,
    /// What godwit does; nothing if it could not be measured.
    pub value: Option<f64>,
    /// Unit of `value` and `peer_value`.
    pub unit: &'static str,
    /// What it is compared with.
    pub peer: Option<&'static str>,
    /// What the peer does, in the same run.
    pub peer_value: Option<f64>,
    /// `value` over `peer_value`.
    pub ratio: Option<f64>,
    /// The bar; it is about the ratio where the definition says so, else about the value.
    pub target: Option<f64>,
    /// Whether the bar is reached; nothing where there is none.
    pub met: Option<bool>,
}

/// What an experiment found out for one row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) value: Option<f64>,
    pub(crate) peer_value: Option<f64>,
}

impl Figure {
    /// A figure without a peer.
    pub(crate) fn alone(name: &'static str, value: Option<f64>) -> Self {
        Self {
            name,
            value,
            peer_value: None,
        }
    }

    /// A figure beside a peer's.
    pub(crate) fn beside(name: &'static str, value: Option<f64>, peer_value: Option<f64>) -> Self {
        Self {
            name,
            value,
            peer_value,
        }
    }
}

impl Definition {
    pub(crate) const fn new(experiment: Experiment, name: &'static str, unit: &'static str) -> Self {
        Self {
            name,
            meaning: "",
            unit,
            peer: None,
            bar: BenchBar::None,
            experiment,
        }
    }

    pub(crate) const fn meaning(self, meaning: &'static str) -> Self {
        Self { meaning, ..self }
    }

    pub(crate) const fn beside(self, peer: &'static str) -> Self {
        Self {
            peer: Some(peer),
            ..self
        }
    }

    pub(crate) const fn bar(self, bar: BenchBar) -> Self {
        Self { bar, ..self }
    }

    /// The row with a figure; without one it is a row that was not measured, and a bar is not reached.
    pub(crate) fn row(&self, figure: Option<Figure>) -> Row {
        let (value, peer_value) = figure.map_or((None, None), |figure| (figure.value, figure.peer_value));
        let ratio = value.zip(peer_value).map(|(value, peer)| value / peer);
        let met = match self.bar {
            BenchBar::AtLeast(bar) => Some(value.is_some_and(|value| value >= bar)),
            BenchBar::AtMost(bar) => Some(value.is_some_and(|value| value <= bar)),
            BenchBar::RatioAtLeast(bar) => Some(ratio.is_some_and(|ratio| ratio >= bar)),
            BenchBar::RatioAtMost(bar) => Some(ratio.is_some_and(|ratio| ratio <= bar)),
            BenchBar::None => None,
        };
        let (name, unit, peer) = (self.name, self.unit, self.peer);
        Row {
            name,
            value,
            unit,
            peer,
            peer_value,
            ratio,
            target: self.bar.number(),
            met,
        }
    }
}

impl BenchBar {
    fn number(self) -> Option<f64> {
        match self {
            BenchBar::AtLeast(bar)
            | BenchBar::AtMost(bar)
            | BenchBar::RatioAtLeast(bar)
            | BenchBar::RatioAtMost(bar) => Some(bar),
            BenchBar::None => None,
        }
    }
}

/// The rows as a table for people.
pub fn table(rows: &[Row]) -> String {
    let cell = |number: Option<f64>| number.map_or_else(|| "–".into(), shown);
    let mut text = format!(
        "{:<34} {:>9} {:<7} {:>9} {:>7} {:>7}  {:<5} {}\n",
        "row", "value", "unit", "peer", "ratio", "target", "met", "compared with"
    );
    for row in rows {
        let met = row.met.map_or("–", |met| if met { "yes" } else { "NO" });
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:<34} {:>9} {:<7} {:>9} {:>7} {:>7}  {met:<5} {}",
            row.name,
            cell(row.value),
            row.unit,
            cell(row.peer_value),
            cell(row.ratio),
            cell(row.target),
            row.peer.unwrap_or_default()
        );
    }
    text
}

fn shown(number: f64) -> String {
    match number.abs() {
        size if size >= 1000.0 => format!("{number:.0}"),
        size if size >= 10.0 => format!("{number:.1}"),
        _ => format!("{number:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(bar: BenchBar) -> Definition {
        Definition::new(Experiment::Idle, "x", "ms")
            .beside("QEMU")
            .bar(bar)
    }

    #[test]
    fn bars_are_about_the_value_or_the_ratio() {
        let figure = Some(Figure::beside("x", Some(2.0), Some(4.0)));
        for (bar, met) in [
            (BenchBar::AtLeast(2.0), Some(true)),
            (BenchBar::AtLeast(2.1), Some(false)),
            (BenchBar::AtMost(1.9), Some(false)),
            (BenchBar::RatioAtLeast(0.6), Some(false)),
            (BenchBar::RatioAtMost(0.5), Some(true)),
            (BenchBar::None, None),
        ] {
            assert_eq!(definition(bar).row(figure).met, met, "{bar:?}");
        }
    }

    #[test]
    fn what_was_not_measured_is_not_reached() {
        let row = definition(BenchBar::AtMost(3.0)).row(None);
        assert_eq!((row.value, row.met), (None, Some(false)));
        let alone = definition(BenchBar::RatioAtLeast(1.0)).row(Some(Figure::alone("x", Some(2.0))));
        assert_eq!((alone.ratio, alone.met), (None, Some(false)));
    }

    #[test]
    fn a_row_has_exactly_the_promised_fields() {
        let row = definition(BenchBar::None).row(None);
        let json = serde_json::to_value(row).unwrap();
        let mut names: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
        names.sort();
        assert_eq!(
            names.join(" "),
            "met name peer peer_value ratio target unit value"
        );
    }

    #[test]
    fn a_table_has_a_line_for_each_row() {
        let rows =
            [definition(BenchBar::AtMost(3.0)).row(Some(Figure::beside("x", Some(1234.5), Some(20.0))))];
        let text = table(&rows);
        assert_eq!(text.lines().count(), 2);
        assert!(text.contains("61.7") && text.contains(" NO "), "{text}");
    }
}
