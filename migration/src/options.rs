use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::converge::FixedCosts;

/// What to do when the downtime cannot be kept within its budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnMiss {
    /// Give up; the guest runs on at the source.
    #[default]
    Fail,
    /// Move it nevertheless.
    Switch,
}

/// What the caller of [`crate::migrate`] asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct MigrateOptions {
    /// Budget of the downtime; 300 ms by default.
    pub max_downtime: Duration,
    /// What to do when it cannot be kept.
    pub on_miss: OnMiss,
    /// Whether both sides compare digests of all memory before the guest runs at the destination.
    pub verify: bool,
    /// Most pre-copy rounds; 30 by default.
    pub max_rounds: u32,
    /// What the downtime costs besides copying memory, as far as nothing was measured yet.
    pub fixed_costs: FixedCosts,
    /// How long to wait for the connection; 5 s by default.
    pub connect_timeout: Duration,
    /// How long the peer may be silent, or take no data; 10 s by default.
    pub io_timeout: Duration,
    /// How long the destination may take for one step of its own (building the machine, restoring its state,
    /// letting it run) while it says that it is alive; 30 s by default.
    pub step_timeout: Duration,
}

impl Default for MigrateOptions {
    fn default() -> Self {
        Self {
            max_downtime: Duration::from_millis(300),
            on_miss: OnMiss::default(),
            verify: false,
            max_rounds: 30,
            fixed_costs: FixedCosts::default(),
            connect_timeout: Duration::from_secs(5),
            io_timeout: Duration::from_secs(10),
            step_timeout: Duration::from_secs(30),
        }
    }
}

/// What the caller of [`crate::receive`] asks for.
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
