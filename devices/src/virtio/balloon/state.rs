//! Saved state of the balloon.

use migration_state::Record;
use serde::{Deserialize, Serialize};

/// Saved state of a [`super::VirtioBalloon`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages of 4 KiB that the guest was asked to give up.
    pub target: u32,
    /// Pages of 4 KiB that the guest reports as given up.
    pub actual: u32,
    /// The first descriptor of the chain that waits for the next request for statistics.
    pub statistics: Option<u16>,
    /// The last command of free page hinting, 0 before the first. None is open after a restore.
    pub command: u32,
    /// The value that the guest writes to pages that it frees.
    pub poison: u32,
}

impl Record for BalloonState {
    const KIND: &'static str = "virtio-balloon";
    const VERSION: u16 = 2;
}
