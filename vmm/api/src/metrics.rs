//! `GET /metrics`: what the devices count.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// What a machine's devices have counted since this process has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// When, in milliseconds since 1970, as Firecracker's metrics have it.
    pub utc_timestamp_ms: u64,
    /// By the name of the device: its counters by their names.
    pub devices: BTreeMap<String, BTreeMap<String, u64>>,
}

impl Metrics {
    /// These counters, at this moment.
    pub fn now(devices: BTreeMap<String, BTreeMap<String, u64>>) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            // Enough for some hundred million years.
            utc_timestamp_ms: since.map_or(0, |since| since.as_millis() as u64),
            devices,
        }
    }
}
