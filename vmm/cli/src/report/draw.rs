//! The picture of a trace.

use migration::{IntervalMs, Outcome, Phase, Progress, Report};
use plotters::element::Text;
use plotters::prelude::{IntoDrawingArea, SVGBackend};
use plotters::style::{RGBColor, WHITE};
use thiserror::Error;

use super::axis::Unit;
use super::figures::{bytes, duration, known, rate};
use super::panel::{
    self, AreaError, FAINT, INK, Level, Panel, PanelPlace, Series, Timeline, bold, text_style,
};
use super::trace::Trace;

const WIDTH: u32 = 1040;
const HEADER_HEIGHT: u32 = 72;
/// Points of a line that can be told apart.
const POINTS: usize = 1000;
/// Far beyond anything that was measured; keeps arithmetic with a file's numbers finite.
const MOST: f64 = 1e24;
/// Characters of a name that are shown.
const NAME_MAX: usize = 60;

const BLUE: RGBColor = RGBColor(0x1f, 0x6f, 0xb2);
const ORANGE: RGBColor = RGBColor(0xd9, 0x7a, 0x0b);
const GREEN: RGBColor = RGBColor(0x2e, 0x8b, 0x57);
const PURPLE: RGBColor = RGBColor(0x7d, 0x4b, 0xa8);
const RED: RGBColor = RGBColor(0xc0, 0x39, 0x2b);

/// The picture cannot be drawn.
#[derive(Debug, Error)]
#[error("the picture cannot be drawn")]
pub(crate) struct DrawError(#[from] AreaError);

/// Draws a trace as SVG.
pub(crate) fn svg(trace: &Trace) -> Result<String, DrawError> {
    let time = timeline(trace);
    let panels = panels(trace);
    let height = HEADER_HEIGHT + panels.iter().map(|(_, height)| height).sum::<u32>();
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let (header, mut rest) = root.split_vertically(HEADER_HEIGHT);
        header.draw(&Text::new(title(trace), (24, 16), bold(17, INK)))?;
        header.draw(&Text::new(subtitle(trace), (24, 44), text_style(13, FAINT)))?;
        let count = panels.len();
        for (n, (panel, height)) in panels.iter().enumerate() {
            let (area, below) = rest.split_vertically(*height);
            let place = PanelPlace {
                first: n == 0,
                last: n + 1 == count,
            };
            panel::draw(&area, panel, &time, place)?;
            rest = below;
        }
        root.present()?;
    }
    Ok(text)
}

/// One line: who went where, and how that ended.
pub(super) fn title(trace: &Trace) -> String {
    let end = match &trace.report {
        Some(report) => match report.outcome {
            Outcome::Moved => "moved",
            Outcome::Failed => "failed",
            Outcome::Cancelled => "cancelled",
            Outcome::InDoubt => "in doubt",
        },
        None if trace.truncated => "the trace is cut off",
        None => "the trace has no end",
    };
    format!(
        "{} → {}: {end}",
        shown(&trace.header.vm),
        shown(&trace.header.destination)
    )
}

/// The figures that count.
pub(super) fn subtitle(trace: &Trace) -> String {
    let budget = duration(trace.header.options.max_downtime_ms);
    let Some(report) = &trace.report else {
        let last = trace.samples.last().copied().unwrap_or_default();
        return format!(
            "at {}: round {}, {} of {} left, {} sent, downtime budget {budget}",
            duration(last.elapsed_ms),
            last.round,
            bytes(last.remaining_bytes as f64),
            bytes(last.total_bytes as f64),
            bytes(last.bytes_sent as f64),
        );
    };
    let rounds = match report.rounds.len() {
        1 => "1 round".into(),
        n => format!("{n} rounds"),
    };
    let total = format!(
        "total {} (predicted {}), {} sent in {rounds}",
        duration(report.total_ms),
        known(report.predicted_total_ms),
        bytes(report.bytes_sent as f64)
    );
    if report.outcome != Outcome::Moved {
        return format!("{total}; downtime budget {budget}");
    }
    let kept = if report.budget_kept { "kept" } else { "missed" };
    format!(
        "downtime {} (predicted {}), budget of {budget} {kept}; {total}",
        known(report.downtime_ms),
        known(report.predicted_downtime_ms)
    )
}

/// A name that somebody chose, on one line.
fn shown(name: &str) -> String {
    let clean = |c: char| if c.is_control() { '?' } else { c };
    let mut text: String = name.chars().take(NAME_MAX).map(clean).collect();
    if name.chars().nth(NAME_MAX).is_some() {
        text.push('…');
    }
    text
}

fn timeline(trace: &Trace) -> Timeline {
    let samples = &trace.samples;
    let total = trace.report.as_ref().map_or(0.0, |report| report.total_ms);
    let end = samples.iter().map(at).fold(total, f64::max).clamp(1.0, MOST);
    let mut rounds = Vec::new();
    let mut n = samples.first().map_or(0, |sample| sample.round.max(1));
    for sample in samples {
        if sample.round > n {
            n = sample.round;
            rounds.push((at(sample), n));
        }
    }
    let sampled = samples.iter().find(|sample| is_switched(sample)).map(at);
    Timeline {
        end,
        rounds,
        switch: sampled.or_else(|| trace.report.as_ref().and_then(reported_switch)),
    }
}

fn is_switched(sample: &Progress) -> bool {
    matches!(sample.phase, Phase::StopAndCopy | Phase::Commit | Phase::Done)
}

/// When the guest was paused, if no sample says so.
fn reported_switch(report: &Report) -> Option<f64> {
    let downtime = report.downtime_ms.filter(|_| report.outcome == Outcome::Moved)?;
    Some((report.total_ms - downtime - report.verify_ms).max(0.0))
}

fn at(sample: &Progress) -> f64 {
    sample.elapsed_ms.clamp(0.0, MOST)
}

/// The panels and their heights.
fn panels(trace: &Trace) -> Vec<(Panel, u32)> {
    let samples = &trace.samples;
    let goal = &trace.header.options;
    let moved = trace
        .report
        .as_ref()
        .filter(|report| report.outcome == Outcome::Moved);
    // What is known of the guest while it runs.
    let running: Vec<Progress> = samples
        .iter()
        .copied()
        .filter(|sample| !is_switched(sample))
        .collect();
    let remaining = Panel {
        title: "Remaining",
        unit: Unit::Bytes,
        format: bytes,
        may_be_log: true,
        fits_lines: false,
        series: vec![series("memory to send", BLUE, samples, |s| {
            Some(s.remaining_bytes as f64)
        })],
        levels: Vec::new(),
    };
    let rates = Panel {
        title: "Rates",
        unit: Unit::Bytes,
        format: rate,
        may_be_log: false,
        fits_lines: false,
        series: vec![
            series("bandwidth", BLUE, samples, |s| Some(s.bandwidth_bytes_per_s)),
            series("dirty rate", ORANGE, &running, |s| Some(s.dirty_bytes_per_s)),
        ],
        levels: Vec::new(),
    };
    let throttle = Panel {
        title: "Throttle",
        unit: Unit::Percent,
        format: |percent| format!("{percent:.0} %"),
        may_be_log: false,
        fits_lines: false,
        series: vec![series("vCPUs held out of the guest", PURPLE, samples, |s| {
            Some(s.throttle_percent)
        })],
        levels: Vec::new(),
    };
    let downtime = Panel {
        title: "Downtime",
        unit: Unit::Tens,
        format: duration,
        may_be_log: true,
        fits_lines: false,
        series: vec![
            series("if paused now; shaded: nine times in ten", GREEN, &running, |s| {
                s.predicted_downtime_ms
            })
            .within(&running, |s| s.predicted_downtime_interval_ms),
        ],
        levels: levels([
            ("budget", RED, Some(goal.max_downtime_ms)),
            ("actual", INK, moved.and_then(|report| report.downtime_ms)),
        ]),
    };
    let total = Panel {
        title: "Total time",
        unit: Unit::Tens,
        format: duration,
        may_be_log: false,
        fits_lines: true,
        series: vec![
            series("predicted; shaded: nine times in ten", GREEN, &running, |s| {
                s.predicted_total_ms
            })
            .within(&running, |s| s.predicted_total_interval_ms),
        ],
        levels: levels([
            ("deadline", RED, goal.deadline_ms),
            ("actual", INK, moved.map(|report| report.total_ms)),
        ]),
    };
    vec![
        (remaining, 200),
        (rates, 190),
        (throttle, 120),
        (downtime, 190),
        (total, 184),
    ]
}

fn levels<const N: usize>(levels: [(&str, RGBColor, Option<f64>); N]) -> Vec<Level> {
    let level = |(name, color, value): (&str, RGBColor, Option<f64>)| {
        let value = value?.clamp(0.0, MOST);
        Some(Level {
            name: format!("{name} {}", duration(value)),
            color,
            value,
        })
    };
    levels.into_iter().filter_map(level).collect()
}

fn series(
    name: &'static str,
    color: RGBColor,
    samples: &[Progress],
    value: impl Fn(&Progress) -> Option<f64>,
) -> Series {
    let mut points: Vec<(f64, f64)> = samples
        .iter()
        .filter_map(|sample| Some((at(sample), value(sample)?.clamp(0.0, MOST))))
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    Series {
        name,
        color,
        points: thinned(&points),
        band: Vec::new(),
    }
}

impl Series {
    /// The same with what its values are likely to be between.
    fn within(self, samples: &[Progress], interval: impl Fn(&Progress) -> Option<IntervalMs>) -> Self {
        let mut band: Vec<(f64, f64, f64)> = samples
            .iter()
            .filter_map(|sample| {
                let IntervalMs { low, high } = interval(sample)?;
                // Of a file that anybody may have written.
                let low = low.clamp(0.0, MOST);
                Some((at(sample), low, high.clamp(0.0, MOST).max(low)))
            })
            .collect();
        band.sort_by(|a, b| a.0.total_cmp(&b.0));
        let width = band.len().div_ceil(POINTS).max(1);
        let widest = |part: &[(f64, f64, f64)]| {
            let ends = part.iter().map(|(_, low, high)| (*low, *high));
            let ends = ends.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
            part.first()
                .zip(ends)
                .map(|(first, (low, high))| (first.0, low, high))
        };
        let band = band.chunks(width).filter_map(widest).collect();
        Self { band, ..self }
    }
}

/// No more points than can be told apart: of each stretch the lowest and the highest, so that no peak is lost.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= POINTS {
        return points.to_vec();
    }
    let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
    let mut few = Vec::with_capacity(POINTS);
    for stretch in points.chunks(points.len().div_ceil(POINTS / 2)) {
        let mut both: Vec<_> = stretch
            .iter()
            .min_by(by_value)
            .into_iter()
            .chain(stretch.iter().max_by(by_value))
            .collect();
        both.sort_by(|a, b| a.0.total_cmp(&b.0));
        few.extend(both);
    }
    few
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    /// How often a text stands in another.
    fn count(text: &str, part: &str) -> usize {
        text.matches(part).count()
    }

    #[test]
    fn the_picture_shows_all_there_is() {
        let text = svg(&testing::trace()).unwrap();
        for part in [
            "web &amp; &lt;more&gt; → tcp:10.0.0.2:7000: moved",
            "downtime 41.2 ms (predicted 42.5 ms), budget of 50.0 ms kept",
            "Remaining",
            "dirty rate",
            "bandwidth",
            "Throttle",
            "budget 50.0 ms",
            "deadline 12.0 s",
            "actual 8.04 s",
        ] {
            assert!(text.contains(part), "no {part:?}");
        }
        assert!(text.starts_with("<svg ") && text.trim_end().ends_with("</svg>"));
        // The switch in each of five panels, and the six lines.
        assert_eq!(count(&text, "fill=\"#C0392B\" stroke=\"none\""), 5);
        assert!(count(&text, "<polyline") >= 6 + 5);
        assert!(!text.contains("NaN") && !text.contains("inf"));
    }

    #[test]
    fn a_trace_without_an_end_is_drawn_as_far_as_it_goes() {
        let mut trace = testing::trace();
        trace.report = None;
        trace.truncated = true;
        trace.samples.truncate(100);
        let text = svg(&trace).unwrap();
        assert!(text.contains("the trace is cut off") && text.contains("left,"));
        assert!(!text.contains("actual"));
        assert_eq!(count(&text, "fill=\"#C0392B\" stroke=\"none\""), 0);
    }

    #[test]
    fn one_sample_and_odd_numbers_are_drawn() {
        let mut trace = testing::trace();
        trace.samples.truncate(1);
        svg(&trace).unwrap();
        let sample = &mut trace.samples[0];
        sample.elapsed_ms = -1e300;
        sample.dirty_bytes_per_s = f64::MAX;
        sample.remaining_bytes = u64::MAX;
        sample.predicted_downtime_ms = Some(f64::MIN_POSITIVE);
        sample.predicted_total_ms = Some(f64::MAX);
        sample.throttle_percent = -7.0;
        sample.predicted_downtime_interval_ms = Some(IntervalMs {
            low: f64::MAX,
            high: -f64::MAX,
        });
        sample.predicted_total_interval_ms = Some(IntervalMs {
            low: -1.0,
            high: f64::MAX,
        });
        let mut other = *sample;
        other.elapsed_ms = f64::MAX;
        other.predicted_downtime_ms = Some(f64::MAX);
        trace.samples.push(other);
        trace.header.options.max_downtime_ms = f64::MAX;
        let text = svg(&trace).unwrap();
        assert!(!text.contains("NaN"));
    }

    #[test]
    fn what_is_likely_is_shaded_and_may_be_missing() {
        let trace = testing::trace();
        let shaded = svg(&trace).unwrap();
        assert_eq!(
            count(&shaded, "<polygon"),
            2 + 1,
            "downtime, total time and the throttle's area"
        );
        // As older versions wrote it.
        let mut old = trace;
        for sample in &mut old.samples {
            sample.predicted_downtime_interval_ms = None;
            sample.predicted_total_interval_ms = None;
        }
        assert_eq!(count(&svg(&old).unwrap(), "<polygon"), 1);
    }

    #[test]
    fn a_long_trace_keeps_its_peaks() {
        let mut points: Vec<(f64, f64)> = (0..100_000).map(|n| (f64::from(n), 1.0)).collect();
        points[77_777].1 = 9.0;
        let few = thinned(&points);
        assert!(few.len() <= POINTS + 2);
        assert!(few.contains(&(77_777.0, 9.0)));
        assert!(few.is_sorted_by(|a, b| a.0 <= b.0));
    }
}
