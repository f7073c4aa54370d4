//! A guest that dirties more than the link carries: does it arrive within the promise, and how much of its work
//! could it do meanwhile? The derivation is in `DESIGN.md`.

use ::tests::Tick;
use anyhow::{Context, Result};
use migration::{Report, Round};

use crate::bench::{Bench, say};
use crate::godwit::{Asked, Ended, Godwit};
use crate::guest::{Guest, PAGE, Rate, pages_at};
use crate::row::Figure;
use crate::stats::{median, share};

const MEMORY_MIB: u64 = 2048;
const RUNS: u32 = 20;
/// Bytes per second that the link may carry, before the pause and after it.
const CAP: f64 = 500e6;
const DEADLINE_MS: f64 = 60_000.0;
const ASKED: [&str; 8] = [
    "--bandwidth",
    "500MB/s",
    "--final-bandwidth",
    "500MB/s",
    "--max-downtime",
    "50ms",
    "--deadline",
    "60s",
];
/// The share of the working set from which on a round counts as one of all of it.
const ALL: f64 = 0.95;

/// Moves the guest again and again.
pub(super) fn run(bench: &mut Bench) -> Result<Vec<Figure>> {
    let guest = Guest::busy(MEMORY_MIB, Rate::Max);
    let workset = (guest.workset_pages() * PAGE) as f64;
    let mut godwit = Godwit::start(&bench.fixtures, guest, &[])?;
    let asked = Asked {
        migrate: &ASKED,
        ..Default::default()
    };
    let (mut all, mut fractions) = (Vec::new(), Vec::new());
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        let what = format!("overload {run}/{runs}");
        let ended = bench.hop(&what, &mut godwit, &asked)?;
        if ended.moved {
            let stretch = Stretch::of(&ended.report, workset, CAP).context("no round after the first")?;
            let fraction = stretch
                .fraction(&ended.ticks)
                .context("no ticks while it converged")?;
            let (seconds, last) = (stretch.seconds, stretch.last / 1e6);
            say(format_args!(
                "{what}: converged in {seconds:.1} s to {last:.1} MB, {fraction:.3} of the ideal work"
            ));
            fractions.push(fraction);
        } else {
            // It did not converge at all.
            fractions.push(0.0);
        }
        all.push(ended);
    }
    let kept =
        |ended: &Ended| ended.moved && ended.report.budget_kept && ended.report.total_ms <= DEADLINE_MS;
    Ok(vec![
        Figure::alone("overload-50ms-kept", share(&all, kept)),
        Figure::alone("overload-work-fraction", median(fractions)),
    ])
}

/// The stretch of a migration in which it converged.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stretch {
    /// How long it was.
    seconds: f64,
    /// Bytes that were dirty at its beginning.
    initial: f64,
    /// Bytes that were dirty at its end, the switch.
    last: f64,
    /// Bytes per second that the link may carry.
    cap: f64,
}

impl Stretch {
    /// From the end of the first pass, or from the beginning of the last round that had to send the whole
    /// working set, whichever is later, to the switch.
    fn of(report: &Report, workset: f64, cap: f64) -> Option<Self> {
        let rounds = report.rounds.get(1..)?;
        let whole = |round: &Round| bytes(round) >= ALL * workset;
        let from = rounds.iter().rposition(whole).unwrap_or(0);
        let rounds = rounds.get(from..)?;
        let sent: u64 = report.rounds.iter().map(|round| round.pages).sum();
        let last = ((report.pages_sent + report.pages_zero).saturating_sub(sent) * PAGE) as f64;
        let initial = bytes(rounds.first()?);
        let seconds = rounds.iter().map(|round| round.ms).sum::<f64>() / 1e3;
        Some(Self {
            seconds,
            initial,
            last,
            cap,
        })
    }

    /// Pages that the guest could have written in that time, at the most: what the link carried less what the
    /// dirty set shrank by.
    fn ideal_pages(&self) -> f64 {
        (self.cap * self.seconds - (self.initial - self.last)) / PAGE as f64
    }

    /// The guest's work over the ideal. The last tick of the source is the switch; the stretch is counted back
    /// from there on the guest's own clock.
    fn fraction(&self, ticks: &[Tick]) -> Option<f64> {
        let switch = ticks.last()?;
        let began = pages_at(ticks, switch.us as f64 - self.seconds * 1e6)?;
        let ideal = self.ideal_pages();
        (ideal > 0.0).then(|| (switch.pages as f64 - began) / ideal)
    }
}

fn bytes(round: &Round) -> f64 {
    (round.pages * PAGE) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKSET: f64 = 512e6;

    fn report(pages: &[u64], last: u64) -> Report {
        let rounds = pages.iter().zip(1..).map(|(&pages, n)| {
            let ms = (pages * PAGE) as f64 / CAP * 1e3;
            Round {
                n,
                pages,
                ms,
                ..Default::default()
            }
        });
        let sent = pages.iter().sum::<u64>() + last;
        let json = serde_json::json!({
            "outcome": "moved", "error": null, "mode": "precopy", "budget_ms": 50, "budget_kept": true,
            "predicted_downtime_ms": null, "downtime_ms": 40, "downtime": {
                "pause_ms": 0, "drain_ms": 0, "final_log_ms": 0, "final_copy_ms": 0, "state_ms": 0,
                "restore_ms": 0, "commit_ms": 0, "resume_ms": 0
            },
            "predicted_total_ms": null, "total_ms": 1, "rounds": rounds.collect::<Vec<_>>(), "bytes_sent": 0,
            "pages_sent": sent, "pages_zero": 0, "streams": 1, "data_path": "gather", "verify_ms": 0,
            "memory_digest": null
        });
        serde_json::from_value(json).unwrap()
    }

    /// Ticks of a guest that writes so many pages per second, the last one at the switch.
    fn steady(pages_per_s: f64, seconds: u64) -> Vec<Tick> {
        let tick = |n: u64| {
            let pages = (pages_per_s * n as f64 / 20.0) as u64;
            Tick {
                n,
                us: n * 50_000,
                max_gap_us: 0,
                pages,
                errors: 0,
            }
        };
        (0..=seconds * 20).map(tick).collect()
    }

    #[test]
    fn waiting_with_a_full_working_set_is_no_convergence() {
        let report = report(&[500_000, 125_000, 125_000, 125_000, 60_000, 30_000], 5_000);
        let stretch = Stretch::of(&report, WORKSET, CAP).unwrap();
        assert_eq!(stretch.initial, 125_000.0 * 4096.0);
        assert_eq!(stretch.last, 5_000.0 * 4096.0);
        assert!((stretch.seconds - 215_000.0 * 4096.0 / CAP).abs() < 1e-9);
    }

    #[test]
    fn a_constant_duty_that_converges_is_the_ideal() {
        // A working set W, a link B, a guest that writes half as fast: rounds halve.
        let pages = [500_000, 125_000, 62_500, 31_250, 15_625];
        let stretch = Stretch::of(&report(&pages, 7_812), WORKSET, CAP).unwrap();
        let half = CAP / 4096.0 / 2.0;
        let fraction = stretch.fraction(&steady(half, 10)).unwrap();
        assert!((fraction - 1.0).abs() < 0.01, "{fraction}");
        let fraction = stretch.fraction(&steady(half / 2.0, 10)).unwrap();
        assert!((fraction - 0.5).abs() < 0.01, "{fraction}");
    }

    #[test]
    fn nothing_to_judge_without_a_second_round() {
        assert_eq!(Stretch::of(&report(&[500_000], 10), WORKSET, CAP), None);
        let stretch = Stretch::of(&report(&[500_000, 100_000], 10), WORKSET, CAP).unwrap();
        assert_eq!(stretch.fraction(&[]), None);
    }
}
