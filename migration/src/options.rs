//! What the caller of a migration can choose, on either side.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What to do when the downtime or the deadline cannot be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnMiss {
    /// Give up; the guest runs on at the source.
    #[default]
    Fail,
    /// Move it nevertheless.
    Switch,
}

/// How page content may be compressed; a range for which it does not pay goes as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// Fast; pays on links of some Gbit/s and less.
    Lz4,
    /// Denser; pays on links of some hundred Mbit/s and less.
    Zstd,
}

/// What the caller of [`crate::migrate`] asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct MigrateOptions {
    /// Budget of the downtime; 300 ms by default.
    pub max_downtime: Duration,
    /// When it must have ended, counted from its start; never by default.
    pub deadline: Option<Duration>,
    /// What to do when either cannot be kept.
    pub on_miss: OnMiss,
    /// Data streams, 1 to 32; 2 by default.
    pub streams: u32,
    /// Most bytes per second while the guest runs; as fast as possible by default.
    pub bandwidth: Option<u64>,
    /// Most bytes per second while it is paused; as fast as possible by default.
    pub final_bandwidth: Option<u64>,
    /// Whether vCPUs may be slowed down to keep the promise; true by default.
    pub throttle: bool,
    /// Whether both sides compare digests of all memory before the guest runs at the destination.
    pub verify: bool,
    /// Whether page content is compressed; not by default.
    pub compression: Option<Compression>,
    /// Whether disks that the destination does not have come along; not by default.
    pub with_disks: bool,
    /// Most pre-copy rounds; 100 by default.
    pub max_rounds: u32,
    /// How long to wait for the connection; 5 s by default.
    pub connect_timeout: Duration,
    /// How long the peer may be silent, or take no data; 10 s by default.
    pub io_timeout: Duration,
    /// How long the destination may take for one step of its own (building the machine, restoring its state,
    /// letting it run) while it says that it is alive; 30 s by default.
    pub step_timeout: Duration,
}

/// The largest share of time that a migration holds a vCPU out of the guest: what keeps the guest alive, and what a
/// machine can do with slices of at most 10 ms.
pub const MAX_THROTTLE: f64 = 0.98;

/// The longest that a guest stands still before a move that [`OnMiss::Switch`] asks for is given up, unless its
/// budget allows more.
pub const MAX_PAUSE: Duration = Duration::from_secs(30);

/// How many times its budget a pause may last before a move that is to keep its promise is given up. The longer of
/// the two limits counts, this one and that of `PAUSE_SLACK`.
const PAUSE_FACTOR: u32 = 3;
/// By how much such a pause may exceed its budget.
const PAUSE_SLACK: Duration = Duration::from_millis(100);

impl MigrateOptions {
    /// How long the guest may stand still before "go": then it is let run on at the source.
    pub fn pause_limit(&self) -> Duration {
        let budget = self.max_downtime;
        let limit = budget
            .saturating_mul(PAUSE_FACTOR)
            .max(budget.saturating_add(PAUSE_SLACK));
        match self.on_miss {
            OnMiss::Fail => limit,
            OnMiss::Switch => limit.max(MAX_PAUSE),
        }
    }
}

/// Most data streams of one migration.
pub const MAX_STREAMS: u32 = 32;

impl Default for MigrateOptions {
    fn default() -> Self {
        Self {
            max_downtime: Duration::from_millis(300),
            deadline: None,
            on_miss: OnMiss::default(),
            streams: 2,
            bandwidth: None,
            final_bandwidth: None,
            throttle: true,
            verify: false,
            compression: None,
            with_disks: false,
            max_rounds: 100,
            connect_timeout: Duration::from_secs(5),
            io_timeout: Duration::from_secs(10),
            step_timeout: Duration::from_secs(30),
        }
    }
}

/// What the caller of [`crate::Receiver::receive`] asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiveOptions {
    /// How long the peer may be silent, or take no data; 10 s by default.
    pub io_timeout: Duration,
    /// How long the source may take for one step of its own while it says that it is alive; 30 s by default.
    pub step_timeout: Duration,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        Self {
            io_timeout: Duration::from_secs(10),
            step_timeout: Duration::from_secs(30),
        }
    }
}
