//! One panel of the picture: series over time, with an axis of its own.

use std::io;
use std::ops::Range;

use plotters::chart::{ChartBuilder, ChartContext};
use plotters::coord::Shift;
use plotters::coord::cartesian::Cartesian2d;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::coord::types::RangedCoordf64;
use plotters::element::{EmptyElement, PathElement, Rectangle, Text};
use plotters::prelude::{DrawingArea, DrawingAreaErrorKind, SVGBackend};
use plotters::series::{AreaSeries, DashedLineSeries, LineSeries};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, FontStyle, IntoFont, RGBColor, ShapeStyle, TextStyle};

/// What the backend can fail with.
pub(super) type AreaError = DrawingAreaErrorKind<io::Error>;
/// A part of the picture.
pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>;

pub(super) const INK: RGBColor = RGBColor(0x22, 0x2b, 0x36);
pub(super) const FAINT: RGBColor = RGBColor(0x6b, 0x76, 0x84);
const GRID: RGBColor = RGBColor(0xe3, 0xe7, 0xec);
const ROUND: RGBColor = RGBColor(0xb4, 0xbd, 0xc8);
const SWITCH: RGBColor = RGBColor(0xc0, 0x39, 0x2b);

/// Room for the labels at the left of every panel, in pixels.
const LABELS_WIDTH: u32 = 84;
/// Room at its right.
const RIGHT: u32 = 24;
/// Room for a panel's title.
const TITLE_HEIGHT: u32 = 26;
/// Room for the labels of the time axis.
const TIME_HEIGHT: u32 = 34;
/// Pixels between marks of rounds.
const ROUND_DISTANCE: f64 = 5.0;
/// Pixels between their names.
const NAME_DISTANCE: f64 = 52.0;

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

/// One line in a panel.
pub(super) struct Series {
    pub(super) name: &'static str,
    pub(super) color: RGBColor,
    /// Time in milliseconds, ascending, and value.
    pub(super) points: Vec<(f64, f64)>,
}

/// A value that holds all the time.
pub(super) struct Level {
    pub(super) name: String,
    pub(super) color: RGBColor,
    pub(super) value: f64,
}

/// What a panel shows.
pub(super) struct Panel {
    pub(super) title: &'static str,
    pub(super) unit: Unit,
    pub(super) format: fn(f64) -> String,
    /// Whether a logarithmic axis may be used where values differ much.
    pub(super) may_be_log: bool,
    pub(super) series: Vec<Series>,
    pub(super) levels: Vec<Level>,
}

/// What all panels share: the time axis and what is marked on it. In milliseconds.
pub(super) struct Timeline {
    pub(super) end: f64,
    /// When each round but the first began.
    pub(super) rounds: Vec<(f64, u32)>,
    pub(super) switch: Option<f64>,
}

/// A value axis: values are drawn at `place(value)`.
struct Scale {
    log: bool,
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

/// An axis with chosen ticks.
struct Axis {
    range: RangedCoordf64,
    ticks: Vec<f64>,
}

impl Axis {
    fn new(range: Range<f64>, ticks: Vec<f64>) -> Self {
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
    fn place(&self, value: f64) -> f64 {
        if self.log {
            value.max(self.low).log2()
        } else {
            value
        }
    }
}

pub(super) fn text_style(size: u32, color: RGBColor) -> TextStyle<'static> {
    // The backend divides by this factor.
    let font = ("sans-serif", f64::from(size) * 1.24).into_font();
    TextStyle {
        color: color.to_backend_color(),
        ..TextStyle::from(font)
    }
}

pub(super) fn bold(size: u32, color: RGBColor) -> TextStyle<'static> {
    let font = ("sans-serif", f64::from(size) * 1.24)
        .into_font()
        .style(FontStyle::Bold);
    TextStyle {
        color: color.to_backend_color(),
        ..TextStyle::from(font)
    }
}

/// Estimated, as no font is known here.
fn text_width(text: &str, size: u32) -> i32 {
    (text.chars().count() as f64 * f64::from(size) * 0.56) as i32
}

/// Where a panel is among the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// At the top, where marks are named.
    pub(super) first: bool,
    /// At the bottom, where the time axis has its labels.
    pub(super) last: bool,
}

/// Draws a panel.
pub(super) fn draw(area: &Area<'_>, panel: &Panel, time: &Timeline, place: Place) -> Result<(), AreaError> {
    let Place { first, last } = place;
    let scale = scale(panel);
    let times = ticks(time.end, Unit::Tens, 8);
    let mut chart = ChartBuilder::on(area)
        .margin_top(TITLE_HEIGHT)
        .margin_right(RIGHT)
        .margin_bottom(if last { 0 } else { 8 })
        .set_label_area_size(plotters::chart::LabelAreaPosition::Left, LABELS_WIDTH)
        .set_label_area_size(
            plotters::chart::LabelAreaPosition::Bottom,
            if last { TIME_HEIGHT } else { 0 },
        )
        .build_cartesian_2d(
            Axis::new(0.0..time.end, times),
            Axis::new(
                scale.place(scale.low)..scale.place(scale.high),
                scale.ticks.iter().map(|tick| scale.place(*tick)).collect(),
            ),
        )?;
    let log = scale.log;
    chart
        .configure_mesh()
        .x_labels(16)
        .y_labels(16)
        .light_line_style(GRID.mix(0.0))
        .bold_line_style(GRID)
        .axis_style(ROUND)
        .label_style(text_style(11, FAINT))
        .x_label_formatter(&|ms| short(&super::figures::duration(*ms)))
        .y_label_formatter(&|place| short(&(panel.format)(if log { place.exp2() } else { *place })))
        .draw()?;
    mark(&mut chart, &scale, time, first)?;
    for series in &panel.series {
        line(&mut chart, panel, &scale, series)?;
    }
    for level in &panel.levels {
        level_line(&mut chart, &scale, level, time.end)?;
    }
    legend(area, panel, &scale)
}

/// The rounds, the switch and the downtime; the first panel says what is what.
fn mark(chart: &mut Chart<'_, '_>, scale: &Scale, time: &Timeline, first: bool) -> Result<(), AreaError> {
    let (bottom, top) = (scale.place(scale.low), scale.place(scale.high));
    let width = f64::from(chart.plotting_area().dim_in_pixel().0).max(1.0);
    let pixel = |at: f64| at / time.end * width;
    let switch = time.switch.unwrap_or(time.end);
    let (mut marked, mut named) = (f64::NEG_INFINITY, f64::NEG_INFINITY);
    for (at, n) in &time.rounds {
        if pixel(*at) - marked < ROUND_DISTANCE {
            continue;
        }
        marked = pixel(*at);
        let style = ShapeStyle::from(&ROUND).stroke_width(1);
        chart.draw_series([PathElement::new([(*at, bottom), (*at, top)], style)])?;
        if first && marked - named >= NAME_DISTANCE && pixel(switch) - marked >= 2.0 * NAME_DISTANCE {
            let style = text_style(10, FAINT).pos(Pos::new(HPos::Left, VPos::Top));
            let name = Text::new(format!("round {n}"), (4, 2), style);
            chart.draw_series([EmptyElement::at((*at, top)) + name])?;
            named = marked;
        }
    }
    if let Some(at) = time.switch {
        let shade = ShapeStyle::from(&SWITCH.mix(0.12)).filled();
        chart.draw_series([Rectangle::new([(at, bottom), (time.end, top)], shade)])?;
        let style = ShapeStyle::from(&SWITCH).stroke_width(2);
        chart.draw_series([PathElement::new([(at, bottom), (at, top)], style)])?;
    }
    if let Some(at) = time.switch.filter(|_| first) {
        // On the side with room.
        let (side, gap) = if pixel(at) > width / 2.0 {
            (HPos::Right, -5)
        } else {
            (HPos::Left, 5)
        };
        let style = text_style(10, SWITCH).pos(Pos::new(side, VPos::Top));
        chart.draw_series([EmptyElement::at((at, top)) + Text::new("switch", (gap, 2), style)])?;
    }
    Ok(())
}

fn line(chart: &mut Chart<'_, '_>, panel: &Panel, scale: &Scale, series: &Series) -> Result<(), AreaError> {
    let place = |(at, value): &(f64, f64)| (*at, scale.place(value.min(scale.high)));
    let points = series.points.iter().map(place);
    let style = ShapeStyle::from(&series.color).stroke_width(2);
    if panel.unit == Unit::Percent {
        let area = AreaSeries::new(points, 0.0, series.color.mix(0.2)).border_style(style);
        chart.draw_series(area)?;
    } else {
        chart.draw_series(LineSeries::new(points, style))?;
    }
    Ok(())
}

fn level_line(chart: &mut Chart<'_, '_>, scale: &Scale, level: &Level, end: f64) -> Result<(), AreaError> {
    if level.value > scale.high || level.value < scale.low {
        return Ok(());
    }
    let at = scale.place(level.value);
    let style = ShapeStyle::from(&level.color).stroke_width(1);
    chart.draw_series(DashedLineSeries::new([(0.0, at), (end, at)], 6, 4, style))?;
    Ok(())
}

/// The title and what its lines are, above the chart.
fn legend(area: &Area<'_>, panel: &Panel, scale: &Scale) -> Result<(), AreaError> {
    const SIZE: u32 = 12;
    let middle = TITLE_HEIGHT as i32 - 11;
    let at = |style: TextStyle<'static>| style.pos(Pos::new(HPos::Left, VPos::Center));
    let mut left = LABELS_WIDTH as i32;
    area.draw(&Text::new(
        panel.title.to_owned(),
        (left, middle),
        at(bold(SIZE, INK)),
    ))?;
    left += text_width(panel.title, SIZE) + 26;
    let names = panel
        .series
        .iter()
        .map(|series| (series.name.to_owned(), series.color, false));
    let levels = panel.levels.iter().map(|level| {
        let shown = (scale.low..=scale.high).contains(&level.value);
        let note = if shown { "" } else { " (off the scale)" };
        (format!("{}{note}", level.name), level.color, true)
    });
    for (name, color, dashed) in names.chain(levels) {
        let style = ShapeStyle::from(&color).stroke_width(if dashed { 1 } else { 2 });
        // A dashed line is two strokes here.
        let strokes: &[(i32, i32)] = if dashed { &[(0, 7), (11, 18)] } else { &[(0, 18)] };
        for (from, to) in strokes {
            area.draw(&PathElement::new(
                [(left + from, middle), (left + to, middle)],
                style,
            ))?;
        }
        area.draw(&Text::new(
            name.clone(),
            (left + 24, middle),
            at(text_style(SIZE, FAINT)),
        ))?;
        left += 24 + text_width(&name, SIZE) + 22;
    }
    Ok(())
}

/// The axis that shows all series, and the levels that are not far off.
fn scale(panel: &Panel) -> Scale {
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
    /// A level may stretch an axis by no more than this.
    const STRETCH: f64 = 3.0;
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
    let high = if high > 0.0 { high * 1.08 } else { 1.0 };
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

/// Without digits that say nothing.
fn short(figure: &str) -> String {
    figure.replace(".00 ", " ").replace(".0 ", " ")
}

/// Round numbers from 0 to `high`, no more than `count` after 0.
fn ticks(high: f64, unit: Unit, count: u32) -> Vec<f64> {
    let mut base = 1.0;
    if unit == Unit::Bytes {
        while high / base >= 1024.0 {
            base *= 1024.0;
        }
    }
    let rough = high / base / f64::from(count);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= rough)
        .unwrap_or(rough)
        * base;
    (0..=count)
        .map(|n| f64::from(n) * step)
        .filter(|tick| *tick <= high)
        .collect()
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
        assert_eq!(short("64.0 MiB"), "64 MiB");
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
            series: vec![Series {
                name: "s",
                color: INK,
                points: values.iter().map(|value| (0.0, *value)).collect(),
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
}
