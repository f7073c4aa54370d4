//! Moves that were recorded, on quiet hosts and busy ones, and what the policy predicts when it is told the same again.
//!
//! `moves.txt` has for each move a line `m LABEL BUDGET_MS BANDWIDTH FINAL_BANDWIDTH ON_MISS DOWNTIME_MS TOTAL_MS`, the last two
//! as they were, and the lines that its source logged with `GODWIT_LOG=recorded=trace`.

use std::time::Duration;

use crate::OnMiss;
use crate::converge::{Costs, Goal, Interval, Observation, Policy};

const MOVES: &str = include_str!("moves.txt");

struct RecordedMove<'a> {
    label: &'a str,
    goal: Goal,
    downtime_ms: f64,
    total_ms: f64,
    lines: Vec<&'a str>,
}

/// What was predicted: the downtime at the switch, the total time after a fifth of it.
#[derive(Default)]
struct Predicted {
    downtime: Option<Interval>,
    total: Option<Interval>,
}

fn moves() -> Vec<RecordedMove<'static>> {
    let mut moves: Vec<RecordedMove<'static>> = Vec::new();
    for line in MOVES.lines() {
        let Some(header) = line.strip_prefix("m ") else {
            moves.last_mut().unwrap().lines.push(line);
            continue;
        };
        let fields: Vec<&str> = header.split(' ').collect();
        let number = |at: usize| fields[at].parse::<f64>().unwrap();
        let rate = |at: usize| Some(number(at)).filter(|rate| *rate > 0.0);
        moves.push(RecordedMove {
            label: fields[0],
            goal: Goal {
                max_downtime: Duration::from_secs_f64(number(1) / 1e3),
                deadline: None,
                on_miss: if fields[4] == "switch" {
                    OnMiss::Switch
                } else {
                    OnMiss::Fail
                },
                final_bandwidth: rate(3),
                bandwidth: rate(2),
                throttle: true,
                cpus: 1,
                max_rounds: 100,
            },
            downtime_ms: number(5),
            total_ms: number(6),
            lines: Vec::new(),
        });
    }
    moves
}

impl RecordedMove<'_> {
    fn replay(&self) -> Predicted {
        let mut policy = Policy::new(self.goal.clone());
        let mut costs = Costs::default();
        let (mut rehearsed, mut predicted) = (Vec::new(), Predicted::default());
        for line in &self.lines {
            let (kind, rest) = line.split_at(1);
            let digits = |letter: char| letter.is_ascii_digit();
            let numbers: Vec<u64> = rest
                .split(|letter| !digits(letter))
                .filter(|text| !text.is_empty())
                .map(|text| text.parse().unwrap())
                .collect();
            let (ns, us) = (
                |at: usize| Duration::from_nanos(numbers[at]),
                |at: usize| Duration::from_micros(numbers[at]),
            );
            if kind == "c" {
                rehearsed.push(Costs {
                    pause: ns(0),
                    drain: ns(1),
                    final_log: ns(2),
                    state: ns(3),
                    restore: ns(4),
                    resume: ns(5),
                    round_trip: ns(6),
                });
                continue;
            }
            if let Some(least) = policy.set_costs(&std::mem::take(&mut rehearsed)) {
                costs = least;
            }
            if kind == "b" {
                policy.burst(numbers[0], us(1));
                continue;
            }
            costs.final_log = us(9);
            policy.assume(costs);
            let at = us(0);
            // Older moves were recorded without.
            let pages = |at: usize| numbers.get(at).map_or(0, |pages| pages * 4096);
            let advice = policy.observe(&Observation {
                at,
                round: numbers[1] as u32,
                end_of_round: numbers[2] == 1,
                unsent: numbers[3] * 4096,
                hot: pages(10),
                put_off: pages(11),
                all_streams: numbers.get(12) != Some(&0),
                dirty: numbers[4] * 4096,
                copied: numbers[5] * 4096,
                copied_data: numbers[6] * 4096,
                wire: numbers[7],
                late: us(8),
                by_vcpu: &[],
            });
            let prediction = advice.prediction;
            predicted.downtime = Some(prediction.downtime_interval);
            if predicted.total.is_none() && prediction.total.is_some_and(|total| at * 5 >= total) {
                predicted.total = prediction.total_interval;
            }
        }
        predicted
    }
}

/// The share of moves that intervals hold, and the median of their widths as a part of what was: one of up to `narrow_ms`
/// counts as no more than `bar`.
fn judged(found: &[(Option<Interval>, f64)], narrow_ms: f64, bar: f64) -> (f64, f64) {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let ends = |interval: &Interval| (ms(interval.low), ms(interval.high));
    let holds = |(interval, actual): &&(Option<Interval>, f64)| {
        interval
            .as_ref()
            .map(ends)
            .is_some_and(|(low, high)| (low..=high).contains(actual))
    };
    let covered = found.iter().filter(holds).count() as f64 / found.len() as f64;
    let width = |(interval, actual): &(Option<Interval>, f64)| {
        let (low, high) = ends(interval.as_ref()?);
        let part = (high - low) / actual;
        Some(if high - low <= narrow_ms {
            part.min(bar)
        } else {
            part
        })
    };
    let mut widths: Vec<f64> = found.iter().filter_map(width).collect();
    widths.sort_by(f64::total_cmp);
    (covered, widths[widths.len() / 2])
}

#[test]
fn intervals_hold_nine_recorded_moves_in_ten_and_are_narrow() {
    let moves = moves();
    let predicted: Vec<Predicted> = moves.iter().map(RecordedMove::replay).collect();
    let judge = |label: &str| {
        let of = || {
            let all = moves.iter().zip(&predicted);
            all.filter(|(one, _)| label.is_empty() || one.label == label)
        };
        let downtimes: Vec<_> = of().map(|(one, told)| (told.downtime, one.downtime_ms)).collect();
        let totals: Vec<_> = of().map(|(one, told)| (told.total, one.total_ms)).collect();
        assert!(downtimes.len() >= 20, "{label}: {} moves", downtimes.len());
        let found = (judged(&downtimes, 2.0, 0.5), judged(&totals, 100.0, 0.35));
        println!("{label}: downtime {:?}, total {:?}", found.0, found.1);
        found
    };
    let (all, quiet, busy) = (judge(""), judge("quiet"), judge("busy"));
    assert!(all.0.0 >= 0.88 && all.1.0 >= 0.88, "{all:?}");
    // One move more or less of so few is 4 %.
    assert!(quiet.0.0 >= 0.85 && quiet.1.0 >= 0.85, "{quiet:?}");
    assert!(busy.0.0 >= 0.85 && busy.1.0 >= 0.85, "{busy:?}");
    // On a busy host wider ones are right.
    assert!(quiet.0.1 <= 0.5 && quiet.1.1 <= 0.36, "{quiet:?}");
    assert!(busy.0.1 <= 1.0 && busy.1.1 <= 0.45, "{busy:?}");
}
