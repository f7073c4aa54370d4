//! Saved state of the network device, and its check against the device that is here.

use migration_state::Record;
use serde::{Deserialize, Serialize};

use super::{MacAddress, NetParameters};
use crate::virtio::DeviceError;

/// Saved state of a [`super::VirtioNet`]. The negotiated features are in the transport's record; a pending announcement
/// is not saved, as the destination announces the guest anyway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The card's address.
    pub mac: MacAddress,
    /// The card's MTU in bytes.
    pub mtu: u16,
    /// Pairs of queues that the card has.
    pub queue_pairs: u16,
    /// Pairs of queues that the driver uses.
    pub active_pairs: u16,
}

impl Record for NetState {
    const KIND: &'static str = "virtio-net";
    const VERSION: u16 = 2;
}

impl NetState {
    /// Checks that the guest finds the device that it knows.
    pub(super) fn check(&self, here: NetParameters) -> Result<(), DeviceError> {
        let mismatch =
            |what, expected: String, got: String| Err(DeviceError::Mismatch { what, expected, got });
        if self.mac != here.mac {
            return mismatch("MAC address", here.mac.to_string(), self.mac.to_string());
        }
        if self.mtu != here.mtu {
            return mismatch("MTU", here.mtu.to_string(), self.mtu.to_string());
        }
        if self.queue_pairs != here.queue_pairs {
            return mismatch(
                "pairs of queues",
                here.queue_pairs.to_string(),
                self.queue_pairs.to_string(),
            );
        }
        if !(1..=self.queue_pairs).contains(&self.active_pairs) {
            let expected = format!("1 to {}", self.queue_pairs);
            return mismatch("pairs of queues in use", expected, self.active_pairs.to_string());
        }
        Ok(())
    }
}
