//! A migration under way, in words: the progress bar and the lines of `status`.

use indicatif::{ProgressBar, ProgressDrawTarget};
use migration::{IntervalMs, Phase, Progress};
use rustix::termios::tcgetwinsize;

use crate::report::figures::{bytes, duration, rate};

/// Columns of a terminal that does not say how many it has.
const COLUMNS: usize = 80;
/// Columns of the bar.
const BAR: usize = 16;
/// From so many columns on there is room for it.
const WITH_BAR: usize = 72;

/// Two lines at the bottom of the terminal; nothing where standard error is none.
pub(super) struct Bar(ProgressBar);

impl Bar {
    pub(super) fn new() -> Self {
        // The target draws only on a terminal.
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = indicatif::ProgressStyle::with_template("{msg}") {
            bar.set_style(style);
        }
        Self(bar)
    }

    pub(super) fn show(&self, progress: &Progress) {
        if !self.0.is_hidden() {
            self.0.set_message(picture(progress, columns()));
            self.0.tick();
        }
    }

    /// Says something above the bar.
    pub(super) fn suspend(&self, say: impl FnOnce()) {
        self.0.suspend(say);
    }

    pub(super) fn clear(&self) {
        self.0.finish_and_clear();
    }
}

/// Of the terminal as it is now.
fn columns() -> usize {
    match tcgetwinsize(rustix::stdio::stderr()) {
        Ok(size) if size.ws_col > 0 => usize::from(size.ws_col),
        _ => COLUMNS,
    }
}

/// How far it is, and below it at what speed: in each line what fits into `columns`, what matters most first.
fn picture(progress: &Progress, columns: usize) -> String {
    // The last column stays free: some terminals wrap there.
    let room = columns.saturating_sub(1);
    let mut far = format!("{} {:>3.0}%", head(progress), done(progress) * 100.0);
    if columns >= WITH_BAR {
        far = format!("{} {far}", bar(done(progress)));
    }
    let left = format!("{} left", bytes(progress.remaining_bytes as f64));
    let finish = time_left(progress).map(|left| format!("done in {}", duration(left)));
    let downtime = downtime(progress);
    let throttle =
        (progress.throttle_percent > 0.0).then(|| format!("throttle {:.0} %", progress.throttle_percent));
    let dirtied = format!("dirtied {}", rate(progress.dirty_bytes_per_s));
    let sent = format!("sent {}", rate(progress.bandwidth_bytes_per_s));
    [
        fitting(room, [Some(far), Some(left), finish]),
        fitting(room, [downtime, throttle, Some(dirtied), Some(sent)]),
    ]
    .join("\n")
}

/// The first parts as far as there is room for them.
fn fitting(room: usize, parts: impl IntoIterator<Item = Option<String>>) -> String {
    let mut line = String::new();
    for part in parts.into_iter().flatten() {
        let separator = if line.is_empty() { "" } else { ", " };
        if !line.is_empty() && width(&line) + separator.len() + width(&part) > room {
            break;
        }
        line.push_str(separator);
        line.push_str(&part);
    }
    line.chars().take(room).collect()
}

fn width(text: &str) -> usize {
    text.chars().count()
}

fn bar(done: f64) -> String {
    let full = (done * BAR as f64) as usize;
    let tip = if full < BAR { ">" } else { "" };
    format!("[{:<BAR$}]", format!("{}{tip}", "=".repeat(full)))
}

fn head(progress: &Progress) -> String {
    match progress.phase {
        Phase::Precopy => format!("{}, round {}", phase(progress.phase), progress.round),
        other => phase(other).into(),
    }
}

/// Share of memory that the destination has, 0 to 1.
fn done(progress: &Progress) -> f64 {
    let total = progress.total_bytes.max(1) as f64;
    match progress.phase {
        Phase::Waiting | Phase::Handshake => 0.0,
        _ => (1.0 - progress.remaining_bytes as f64 / total).clamp(0.0, 1.0),
    }
}

/// What the downtime is likely to be between, or about what it is.
fn downtime(progress: &Progress) -> Option<String> {
    let about = progress.predicted_downtime_ms?;
    let text = progress.predicted_downtime_interval_ms.map_or_else(
        || duration(about),
        |IntervalMs { low, high }| format!("{} to {}", duration(low), duration(high)),
    );
    Some(format!("downtime {text}"))
}

/// In milliseconds.
fn time_left(progress: &Progress) -> Option<f64> {
    Some((progress.predicted_total_ms? - progress.elapsed_ms).max(0.0))
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Waiting => "waiting",
        Phase::Handshake => "handshake",
        Phase::Mirror => "disks",
        Phase::Precopy => "pre-copy",
        Phase::StopAndCopy => "stop-and-copy",
        Phase::Commit => "commit",
        Phase::Done => "done",
    }
}

/// The lines of `status` about a migration.
pub(super) fn lines(progress: &Progress) -> Vec<String> {
    if matches!(progress.phase, Phase::Waiting | Phase::Handshake | Phase::Done) {
        return vec![format!("migration  {}", phase(progress.phase))];
    }
    let mut lines = vec![
        format!(
            "migration  {} for {}, {} sent",
            head(progress),
            duration(progress.elapsed_ms),
            bytes(progress.bytes_sent as f64)
        ),
        format!(
            "remaining  {} of {}",
            bytes(progress.remaining_bytes as f64),
            bytes(progress.total_bytes as f64)
        ),
        format!(
            "rates      dirtied {}, sent {}, throttle {:.0} %",
            rate(progress.dirty_bytes_per_s),
            rate(progress.bandwidth_bytes_per_s),
            progress.throttle_percent
        ),
    ];
    let downtime = downtime(progress);
    let finish = time_left(progress).map(|ms| format!("done in {}", duration(ms)));
    let predicted: Vec<String> = downtime.into_iter().chain(finish).collect();
    if !predicted.is_empty() {
        lines.push(format!("predicted  {}", predicted.join(", ")));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress() -> Progress {
        Progress {
            phase: Phase::Precopy,
            round: 3,
            remaining_bytes: 512 << 20,
            total_bytes: 2 << 30,
            bytes_sent: 3 << 30,
            dirty_bytes_per_s: 3e8,
            bandwidth_bytes_per_s: 1e9,
            throttle_percent: 20.0,
            predicted_downtime_ms: Some(14.2),
            predicted_total_ms: Some(8000.0),
            elapsed_ms: 5000.0,
            ..Progress::default()
        }
    }

    #[test]
    fn lines_fit_any_terminal_and_drop_the_least_first() {
        for columns in 0..200 {
            for line in picture(&progress(), columns).lines() {
                assert!(width(line) < columns.max(1), "{columns}: {line:?}");
            }
        }
        // All of it has room on the usual terminal, with the longest figures that are usual.
        let long = Progress {
            round: 12,
            remaining_bytes: 1536 << 20,
            throttle_percent: 99.0,
            predicted_downtime_ms: Some(1234.0),
            predicted_downtime_interval_ms: Some(IntervalMs {
                low: 876.0,
                high: 1567.0,
            }),
            predicted_total_ms: Some(130_000.0),
            ..progress()
        };
        assert_eq!(
            picture(&long, COLUMNS),
            "[====>           ] pre-copy, round 12  25%, 1.50 GiB left, done in 2 min 5 s\n\
             downtime 876 ms to 1.57 s, throttle 99 %, dirtied 286 MiB/s, sent 954 MiB/s"
        );
        assert_eq!(
            picture(&progress(), 40),
            "pre-copy, round 3  75%, 512 MiB left\ndowntime 14.2 ms, throttle 20 %"
        );
        assert_eq!(picture(&progress(), 12), "pre-copy, r\ndowntime 14");
    }

    #[test]
    fn a_bar_is_as_wide_as_ever() {
        for done in [0.0, 0.5, 0.999, 1.0] {
            assert_eq!(width(&bar(done)), BAR + 2);
        }
    }

    #[test]
    fn status_says_what_is_known() {
        let text = lines(&progress()).join("\n");
        for part in [
            "pre-copy, round 3 for 5.00 s",
            "512 MiB of 2.00 GiB",
            "throttle 20 %",
            "downtime 14.2 ms, done in 3.00 s",
        ] {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
        let unknown = Progress {
            predicted_downtime_ms: None,
            predicted_total_ms: None,
            ..progress()
        };
        assert!(!lines(&unknown).join("\n").contains("predicted"));
        assert_eq!(lines(&Progress::default()), ["migration  waiting"]);
    }
}
