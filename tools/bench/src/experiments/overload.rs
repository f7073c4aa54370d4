//! A guest that dirties more than the link carries: does it arrive within the promise, and how much of its work
//! could it do meanwhile? The derivation is in `DESIGN.md`.

use ::tests::Tick;
use std::fmt;

use anyhow::{Context, Result};
use migration::{Report, Round};

use crate::bench::{Bench, print_status};
use crate::godwit::{Asked, Godwit, MigrationEnd};
use crate::guest::{BenchGuest, BenchRate, PAGE, pages_at};
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
    let guest = BenchGuest::busy(MEMORY_MIB, BenchRate::Max);
    let workset = (guest.workset_pages() * PAGE) as f64;
    let mut godwit = Godwit::start(&bench.fixtures, guest, &[])?;
    let asked = Asked {
        migrate: &ASKED,
        promise: true,
        reserve: true,
        ..Default::default()
    };
    let (mut all, mut fractions) = (Vec::new(), Vec::new());
    let runs = bench.count(RUNS);
    for run in 1..=runs {
        let what = format!("overload {run}/{runs}");
        let ended = bench.hop(&what, &mut godwit, &asked)?;
        if ended.moved {
            let work = ConvergingWork::of(&ended.report, &ended.ticks, workset)
                .context("no round after the first")?;
            print_status(format_args!("{what}: {work}"));
            // More than the cap allows to send in that time has no ideal, and is no merit.
            fractions.push(work.fraction().unwrap_or(0.0));
        } else {
            // It did not converge at all.
            fractions.push(0.0);
        }
        all.push(ended);
    }
    let kept = |ended: &MigrationEnd| {
        ended.moved && ended.report.budget_kept && ended.report.total_ms <= DEADLINE_MS
    };
    Ok(vec![
        Figure::alone("overload-50ms-kept", share(&all, kept)),
        Figure::alone("overload-work-fraction", median(fractions)),
    ])
}

/// The rounds from one of them to the switch, and what is derived from their times and pages.
#[derive(Clone, Copy, Debug, PartialEq)]
struct RoundStretch {
    /// How long it was.
    seconds: f64,
    /// Pages that were dirty at its beginning.
    initial: f64,
    /// Pages that were sent in it.
    sent: f64,
    /// Pages that were dirty at its end, the switch.
    last: f64,
}

/// The work of a guest while its migration converged.
#[derive(Clone, Copy, Debug, PartialEq)]
struct ConvergingWork {
    /// From the beginning of the last round that had to send the whole working set.
    converging: RoundStretch,
    /// The fraction in the stretch one round later by the guest's own count, where there is such a round.
    by_ticks: Option<f64>,
}

impl RoundStretch {
    fn of(rounds: &[Round], last: f64) -> Option<Self> {
        let initial = rounds.first()?.pages as f64;
        let sent = rounds.iter().map(|round| round.pages as f64).sum();
        let seconds = rounds.iter().map(|round| round.ms).sum::<f64>() / 1e3;
        Some(Self {
            seconds,
            initial,
            sent,
            last,
        })
    }

    /// Pages that the guest could have written in that time, at the most: what the link could carry less what
    /// the dirty set shrank by. Nothing if there was no time for any.
    fn ideal(&self) -> Option<f64> {
        let pages = CAP * self.seconds / PAGE as f64 - (self.initial - self.last);
        (pages > 0.0).then_some(pages)
    }

    /// Pages that the guest wrote, by what had to be sent for it.
    fn dirtied(&self) -> f64 {
        self.sent - (self.initial - self.last)
    }
}

impl ConvergingWork {
    fn of(report: &Report, ticks: &[Tick], workset: f64) -> Option<Self> {
        let rounds = report.rounds.get(1..)?;
        let whole = |round: &Round| (round.pages * PAGE) as f64 >= ALL * workset;
        let from = rounds.iter().rposition(whole).unwrap_or(0);
        let sent: u64 = report.rounds.iter().map(|round| round.pages).sum();
        let last = (report.pages_sent + report.pages_zero).saturating_sub(sent) as f64;
        let converging = RoundStretch::of(rounds.get(from..)?, last)?;
        let by_ticks = RoundStretch::of(rounds.get(from + 1..)?, last).and_then(|later| {
            // The source's last tick is the switch.
            let switch = ticks.last()?;
            let began = pages_at(ticks, switch.us as f64 - later.seconds * 1e6)?;
            Some((switch.pages as f64 - began) / later.ideal()?)
        });
        Some(Self { converging, by_ticks })
    }

    /// The lower of the two counts.
    fn fraction(&self) -> Option<f64> {
        let by_rounds = self.converging.dirtied() / self.converging.ideal()?;
        Some(
            self.by_ticks
                .map_or(by_rounds, |by_ticks| by_rounds.min(by_ticks)),
        )
    }
}

impl fmt::Display for ConvergingWork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RoundStretch {
            seconds,
            initial,
            last,
            ..
        } = self.converging;
        let mb = |pages: f64| pages * PAGE as f64 / 1e6;
        let share = |share: Option<f64>| share.map_or_else(|| "–".into(), |share| format!("{share:.3}"));
        write!(
            f,
            "converged in {seconds:.1} s from {:.0} to {:.1} MB; of the ideal work {} by its pages, {} by the guest's ticks",
            mb(initial),
            mb(last),
            share(
                self.converging
                    .ideal()
                    .map(|ideal| self.converging.dirtied() / ideal)
            ),
            share(self.by_ticks)
        )
    }
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
        let work = ConvergingWork::of(&report, &[], WORKSET).unwrap();
        let RoundStretch {
            seconds,
            initial,
            sent,
            last,
        } = work.converging;
        assert_eq!((initial, sent, last), (125_000.0, 215_000.0, 5_000.0));
        assert!((seconds - 215_000.0 * 4096.0 / CAP).abs() < 1e-9);
        assert_eq!(work.by_ticks, None);
    }

    #[test]
    fn a_constant_duty_that_converges_is_the_ideal() {
        // A guest that writes half as fast as the link carries: rounds halve.
        let report = report(&[500_000, 125_000, 62_500, 31_250, 15_625], 7_812);
        let half = CAP / 4096.0 / 2.0;
        let fraction = |rate| {
            ConvergingWork::of(&report, &steady(rate, 10), WORKSET)
                .unwrap()
                .fraction()
                .unwrap()
        };
        assert!((fraction(half) - 1.0).abs() < 0.01, "{}", fraction(half));
        // What the report says counts only if the guest says so as well.
        assert!(
            (fraction(half / 2.0) - 0.5).abs() < 0.01,
            "{}",
            fraction(half / 2.0)
        );
        assert!(
            (fraction(half * 2.0) - 1.0).abs() < 0.01,
            "{}",
            fraction(half * 2.0)
        );
    }

    #[test]
    fn an_idle_link_is_lost_work() {
        let mut report = report(&[500_000, 125_000, 62_500, 31_250], 15_625);
        let ideal = ConvergingWork::of(&report, &[], WORKSET)
            .unwrap()
            .fraction()
            .unwrap();
        assert!((ideal - 1.0).abs() < 0.01, "{ideal}");
        for round in &mut report.rounds {
            round.ms *= 2.0;
        }
        let fraction = ConvergingWork::of(&report, &[], WORKSET)
            .unwrap()
            .fraction()
            .unwrap();
        // Twice the time for the same: 328,125 pages could have been written, not 109,375.
        assert!((fraction - 109_375.0 / 328_125.0).abs() < 0.01, "{fraction}");
    }

    #[test]
    fn nothing_to_judge_without_a_second_round() {
        assert_eq!(ConvergingWork::of(&report(&[500_000], 10), &[], WORKSET), None);
    }
}
