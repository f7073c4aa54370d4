//! Migrations that never were.

use migration::{IntervalMs, Phase, Progress, Report};

use super::trace::{FORMAT, Trace, TraceGoal, TraceHeader};

/// A sample at `elapsed_ms`.
pub(super) fn progress(elapsed_ms: f64) -> Progress {
    Progress {
        phase: Phase::Precopy,
        round: 1,
        remaining_bytes: 1 << 30,
        total_bytes: 1 << 31,
        dirty_bytes_per_s: 300e6,
        bandwidth_bytes_per_s: 500e6,
        predicted_downtime_ms: Some(400.0),
        predicted_total_ms: Some(9000.0),
        elapsed_ms,
        ..Progress::default()
    }
}

/// A report of a guest that moved.
pub(super) fn report() -> Report {
    let text = r#"{"outcome":"moved","error":null,"mode":"precopy","budget_ms":50,"budget_kept":true,
        "predicted_downtime_ms":42.5,"downtime_ms":41.2,"downtime":{"pause_ms":0.2,"drain_ms":0.1,
        "final_log_ms":0.5,"final_copy_ms":35.4,"state_ms":1,"restore_ms":2,"commit_ms":1,"resume_ms":1},
        "predicted_total_ms":7900,"total_ms":8041.2,"rounds":[{"n":1,"pages":524288,"bytes":2147483648,"ms":4300,
        "dirty_bytes_per_s":4e8,"bandwidth_bytes_per_s":5e8,"throttle_percent":0},{"n":2,"pages":131072,
        "bytes":536870912,"ms":1080,"dirty_bytes_per_s":4e8,"bandwidth_bytes_per_s":5e8,"throttle_percent":30}],
        "bytes_sent":3147483648,"pages_sent":655360,"pages_zero":1000,"streams":2,"data_path":"gather",
        "verify_ms":0,"memory_digest":null}"#;
    serde_json::from_str(text).unwrap()
}

/// A guest that dirties almost as fast as the link carries, until it is throttled: 2 GiB, 500 MB/s, 8 s.
pub(super) fn trace() -> Trace {
    let mut samples = Vec::new();
    let (mut remaining, mut round, mut sent, mut round_left) =
        ((1u64 << 31) as f64, 1, 0.0, (1u64 << 31) as f64);
    const STEP: f64 = 0.02;
    for step in 0..400 {
        let time = f64::from(step) * STEP;
        let throttle = ((time - 4.3) * 25.0).clamp(0.0, 60.0);
        let wobble = 1.0 + 0.08 * (time * 9.0).sin() + 0.04 * (time * 31.0).cos();
        let bandwidth = 5e8 * (1.0 + 0.03 * (time * 17.0).sin());
        let dirty = 4e8 * wobble * (1.0 - throttle / 100.0);
        sent += bandwidth * STEP;
        round_left -= bandwidth * STEP;
        remaining = (remaining - bandwidth * STEP
            + dirty * STEP * (0.55 + 0.4 * (remaining / 512e6).min(1.0)))
        .max(16e6);
        if round_left <= 0.0 {
            round += 1;
            round_left = remaining.max(150e6);
        }
        let downtime = 4.0 + remaining / bandwidth * 1e3;
        let total = 7900.0 + 1500.0 * (-time / 2.0).exp() * (time * 5.0).cos();
        samples.push(Progress {
            round,
            remaining_bytes: remaining as u64,
            total_bytes: 1 << 31,
            bytes_sent: sent as u64,
            dirty_bytes_per_s: dirty,
            bandwidth_bytes_per_s: bandwidth,
            throttle_percent: throttle,
            predicted_downtime_ms: Some(downtime),
            predicted_downtime_interval_ms: Some(IntervalMs {
                low: downtime * 0.8,
                high: downtime * 1.3,
            }),
            predicted_total_ms: (time > 0.3).then_some(total),
            predicted_total_interval_ms: (time > 0.3).then_some(IntervalMs {
                low: total - 0.15 * (8041.0 - time * 1e3),
                high: total + 0.2 * (8041.0 - time * 1e3),
            }),
            elapsed_ms: time * 1e3,
            ..progress(0.0)
        });
    }
    for step in 0..4 {
        samples.push(Progress {
            phase: Phase::StopAndCopy,
            remaining_bytes: (3 - step) << 22,
            bandwidth_bytes_per_s: 5e8,
            dirty_bytes_per_s: 0.0,
            elapsed_ms: 8000.0 + 10.0 * step as f64,
            round,
            ..progress(0.0)
        });
    }
    Trace {
        header: TraceHeader {
            format: FORMAT,
            godwit_version: "0.1.0".into(),
            vm: "web & <more>".into(),
            destination: "tcp:10.0.0.2:7000".into(),
            started_unix_ms: 0,
            options: TraceGoal {
                max_downtime_ms: 50.0,
                deadline_ms: Some(12_000.0),
            },
        },
        samples,
        report: Some(report()),
        truncated: false,
    }
}
