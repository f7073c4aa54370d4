//! Saved state of the entropy device.

use migration_state::Record;
use serde::{Deserialize, Serialize};

/// There is nothing to remember between two requests; the record says that the device is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

impl Record for RngState {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u16 = 1;
}
