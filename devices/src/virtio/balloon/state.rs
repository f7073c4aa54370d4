//! Saved state of the balloon.

use migration_state::Record;
use serde::{Deserialize, Serialize};

/// Saved state of a [`super::VirtioBalloon`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages of 4 KiB that the guest was asked to give up.
    pub target: u32,
    /// Pages of 4 KiB that it says it has given up.
    pub actual: u32,
    /// The first descriptor of the chain that waits for the next wish for statistics.
    pub statistics: Option<u16>,
    /// The last command to tell what is free, 0 before the first. None is open.
    pub command: u32,
    /// What the guest says that it puts into pages that it frees.
    pub poison: u32,
}

impl Record for BalloonState {
    const KIND: &'static str = "virtio-balloon";
    const VERSION: u16 = 2;
}
