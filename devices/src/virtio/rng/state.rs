//! Saved state of the entropy device.

use migration_state::Record;
use serde::{Deserialize, Serialize};

/// The device keeps nothing between two requests; the record only shows that the device exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

impl Record for RngState {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u16 = 1;
}
