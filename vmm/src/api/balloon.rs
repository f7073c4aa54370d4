//! `PATCH /balloon` and `GET /balloon/statistics`, with Firecracker's fields.

use std::time::{Duration, Instant};

use devices::virtio::balloon::{Control, PAGE_SIZE, Statistics};
use serde::{Deserialize, Serialize};

/// How long new statistics are waited for; a guest that is busy sends them later.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is looked whether they are there.
const INTERVAL: Duration = Duration::from_millis(5);

/// Body of `PATCH /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// How much of its memory the guest is to give up, in MiB.
    pub amount_mib: u64,
}

/// What is known of a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatistics {
    /// What the guest is to give up, in pages of 4 KiB.
    pub target_pages: u64,
    /// What it says that it has given up, in pages of 4 KiB.
    pub actual_pages: u64,
    /// The target in MiB.
    pub target_mib: u64,
    /// What it says that it has given up, in MiB.
    pub actual_mib: u64,
    /// Bytes that went back to the host so far, for the target or because the guest did not use them; those included
    /// that it took again.
    pub given_up_bytes: u64,
    /// What the guest says of its memory, as far as it does.
    #[serde(flatten)]
    pub guest: Statistics,
}

impl BalloonStatistics {
    /// Asks the guest for news, if it ever sent some, and waits for them a moment.
    pub(super) async fn ask(control: &Control) -> Self {
        let (_, seen) = control.statistics();
        control.ask_for_statistics();
        let begin = Instant::now();
        while seen > 0 && control.statistics().1 == seen && begin.elapsed() < PATIENCE {
            tokio::time::sleep(INTERVAL).await;
        }
        let (target, actual) = (control.target(), control.actual());
        Self {
            target_pages: target / PAGE_SIZE,
            actual_pages: actual / PAGE_SIZE,
            target_mib: target >> 20,
            actual_mib: actual >> 20,
            given_up_bytes: control.given_up(),
            guest: control.statistics().0.unwrap_or_default(),
        }
    }
}
