//! The report of one migration: the object that `godwit migrate --json` prints.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::converge::Interval;

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest runs at the destination.
    Moved,
    /// The guest runs at the source, as before.
    Failed,
    /// As `Failed`, because somebody asked for it.
    Cancelled,
    /// "go" was sent and the answer never came: the source stays paused until somebody finds out.
    InDoubt,
}

/// How page content gets to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataPath {
    /// Written to the socket straight from guest memory; the kernel copies it.
    Gather,
    /// The network card reads it from guest memory (MSG_ZEROCOPY).
    Zerocopy,
    /// The destination maps the same memory.
    Handover,
}

/// The terms of the downtime, in milliseconds; they add up to [`Report::downtime_ms`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Downtime {
    /// From the first vCPU asked to leave to the last one out.
    pub pause_ms: f64,
    /// Device work in flight and disk flushes.
    pub drain_ms: f64,
    /// The last harvest of dirty pages.
    pub final_log_ms: f64,
    /// Sending the last dirty pages.
    pub final_copy_ms: f64,
    /// Saving and sending device and vCPU state.
    pub state_ms: f64,
    /// Restoring it, measured by the destination.
    pub restore_ms: f64,
    /// "ready", release of the locks, "go": what is left of the total.
    pub commit_ms: f64,
    /// Locks taken and vCPUs let in, measured by the destination.
    pub resume_ms: f64,
}

/// One pre-copy round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Counted from 1.
    pub n: u32,
    /// Pages sent, zero pages included.
    pub pages: u64,
    /// Bytes put on the wire.
    pub bytes: u64,
    /// Duration.
    pub ms: f64,
    /// Bytes that the guest dirtied per second meanwhile.
    pub dirty_bytes_per_s: f64,
    /// Bytes sent per second.
    pub bandwidth_bytes_per_s: f64,
    /// Share of time that the vCPUs were held out of the guest, in percent.
    pub throttle_percent: f64,
}

/// How often the guest stood still so that its next pause could be predicted, and for how long, in milliseconds: none of
/// it is part of the downtime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RehearsalPauses {
    /// How often.
    pub count: u32,
    /// For how long in all.
    pub sum: f64,
    /// For how long at the most.
    pub max: f64,
}

impl RehearsalPauses {
    /// One more.
    pub(crate) fn add(&mut self, ms: f64) {
        self.count = self.count.saturating_add(1);
        self.sum += ms;
        self.max = self.max.max(ms);
    }
}

/// What holds a predicted time nine times in ten, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct IntervalMs {
    /// Less is unlikely.
    pub low: f64,
    /// More is unlikely.
    pub high: f64,
}

impl From<Interval> for IntervalMs {
    fn from(interval: Interval) -> Self {
        Self {
            low: ms(interval.low),
            high: ms(interval.high),
        }
    }
}

/// A digest of all guest memory on either side, in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryDigest {
    /// At the source, paused.
    pub source: String,
    /// At the destination, before it runs.
    pub destination: String,
}

/// What one migration did. Times in milliseconds, rates in bytes per second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// Why, where it was not moved; where it was, what went wrong all the same.
    pub error: Option<String>,
    /// `precopy`.
    pub mode: String,
    /// The downtime that the caller allowed.
    pub budget_ms: f64,
    /// Whether the downtime stayed within it; false where nothing was moved.
    pub budget_kept: bool,
    /// The prediction on which the source decided to pause.
    pub predicted_downtime_ms: Option<f64>,
    /// What was to hold the downtime nine times in ten; none in the reports of older versions.
    #[serde(default)]
    pub predicted_downtime_interval_ms: Option<IntervalMs>,
    /// What it was: from the pause at the source to the arrival there of "resumed", less half a round trip
    /// and less `verify_ms`.
    pub downtime_ms: Option<f64>,
    /// Its terms.
    pub downtime: Downtime,
    /// Short pauses before that, to measure what the pause would cost; none in the reports of older versions.
    #[serde(default)]
    pub rehearsal_pause_ms: RehearsalPauses,
    /// The prediction of the total time, made as soon as a fifth of it had passed.
    pub predicted_total_ms: Option<f64>,
    /// What was to hold the total time nine times in ten, from the same moment.
    #[serde(default)]
    pub predicted_total_interval_ms: Option<IntervalMs>,
    /// From the start of the job to its end.
    pub total_ms: f64,
    /// Every pre-copy round.
    pub rounds: Vec<Round>,
    /// Bytes put on the wire, everything included.
    pub bytes_sent: u64,
    /// Pages sent with their content.
    pub pages_sent: u64,
    /// Pages sent as zero.
    pub pages_zero: u64,
    /// Pages that were left out of the first round because the guest said that it does not use them; none in the
    /// reports of older versions.
    #[serde(default)]
    pub pages_unused: u64,
    /// Disks that came along.
    #[serde(default)]
    pub disks: u32,
    /// Bytes of their content that were sent, zeroes left out; part of `bytes_sent` and not of `pages_sent`.
    #[serde(default)]
    pub disk_bytes: u64,
    /// How long memory waited for them.
    #[serde(default)]
    pub mirror_ms: f64,
    /// Number of data streams; 0 where memory was handed over.
    pub streams: u32,
    /// How page content got to the destination.
    pub data_path: DataPath,
    /// Time spent on digests with `--verify`; not part of the downtime.
    pub verify_ms: f64,
    /// With `--verify`.
    pub memory_digest: Option<MemoryDigest>,
}

impl Downtime {
    /// The sum of the terms.
    pub(crate) fn total_ms(&self) -> f64 {
        let Self {
            pause_ms,
            drain_ms,
            final_log_ms,
            final_copy_ms,
            state_ms,
            restore_ms,
            commit_ms,
            resume_ms,
        } = *self;
        pause_ms + drain_ms + final_log_ms + final_copy_ms + state_ms + restore_ms + commit_ms + resume_ms
    }
}

impl Report {
    /// The report of a migration that has not done anything yet.
    pub(crate) fn new(budget_ms: f64) -> Self {
        Self {
            outcome: Outcome::Failed,
            error: None,
            mode: "precopy".into(),
            budget_ms,
            budget_kept: false,
            predicted_downtime_ms: None,
            predicted_downtime_interval_ms: None,
            downtime_ms: None,
            downtime: Downtime::default(),
            rehearsal_pause_ms: RehearsalPauses::default(),
            predicted_total_ms: None,
            predicted_total_interval_ms: None,
            total_ms: 0.0,
            rounds: Vec::new(),
            bytes_sent: 0,
            pages_sent: 0,
            pages_zero: 0,
            pages_unused: 0,
            disks: 0,
            disk_bytes: 0,
            mirror_ms: 0.0,
            streams: 0,
            data_path: DataPath::Gather,
            verify_ms: 0.0,
            memory_digest: None,
        }
    }

    /// Adds an error to those that are already there.
    pub(crate) fn add_error(&mut self, error: &str) {
        self.error = Some(
            self.error
                .take()
                .map_or_else(|| error.into(), |before| format!("{before}; {error}")),
        );
    }

    /// Puts the error that came first, and caused the others, before them.
    pub(crate) fn put_error_first(&mut self, error: &str) {
        self.error = Some(
            self.error
                .take()
                .map_or_else(|| error.into(), |after| format!("{error}; {after}")),
        );
    }
}

/// A duration in the report's unit.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
