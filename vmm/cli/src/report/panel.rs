//! One panel of the picture: series over time, with an axis of its own.

use std::io;

use plotters::chart::{ChartBuilder, ChartContext};
use plotters::coord::Shift;
use plotters::coord::cartesian::Cartesian2d;
use plotters::element::{Circle, EmptyElement, PathElement, Polygon, Rectangle, Text};
use plotters::prelude::{DrawingArea, DrawingAreaErrorKind, SVGBackend};
use plotters::series::{AreaSeries, DashedLineSeries, LineSeries};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, FontStyle, IntoFont, RGBColor, ShapeStyle, TextStyle};

use super::axis::{Axis, Scale, Unit, scale, ticks};

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

/// One line in a panel.
pub(super) struct Series {
    pub(super) name: &'static str,
    pub(super) color: RGBColor,
    /// Time in milliseconds, ascending, and value.
    pub(super) points: Vec<(f64, f64)>,
    /// Time, and between what the value is likely to be; empty where that is not known.
    pub(super) band: Vec<(f64, f64, f64)>,
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
    /// Whether the axis begins and ends where the lines do, whatever the levels are: they differ by little.
    pub(super) fits_lines: bool,
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
pub(super) struct PanelPlace {
    /// At the top, where marks are named.
    pub(super) first: bool,
    /// At the bottom, where the time axis has its labels.
    pub(super) last: bool,
}

/// Draws a panel.
pub(super) fn draw(
    area: &Area<'_>,
    panel: &Panel,
    time: &Timeline,
    place: PanelPlace,
) -> Result<(), AreaError> {
    let PanelPlace { first, last } = place;
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
    let inside = |value: f64| scale.place(value.clamp(scale.low, scale.high));
    if series.band.len() > 1 {
        let upper = series.band.iter().map(|(at, _, high)| (*at, inside(*high)));
        let lower = series.band.iter().rev().map(|(at, low, _)| (*at, inside(*low)));
        let shade = series.color.mix(0.16).filled();
        chart.draw_series([Polygon::new(upper.chain(lower).collect::<Vec<_>>(), shade)])?;
    }
    let style = ShapeStyle::from(&series.color).stroke_width(2);
    if let [only] = &series.points[..] {
        // A line of one point cannot be seen.
        chart.draw_series([Circle::new(place(only), 3, style.filled())])?;
    } else if panel.unit == Unit::Percent {
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

/// Without digits that say nothing.
fn short(figure: &str) -> String {
    figure.replace(".00 ", " ").replace(".0 ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_short() {
        let given = ["64.0 MiB", "1.00 GiB/s", "12.5 ms", "0 ms"];
        assert_eq!(given.map(short), ["64 MiB", "1 GiB/s", "12.5 ms", "0 ms"]);
    }
}
