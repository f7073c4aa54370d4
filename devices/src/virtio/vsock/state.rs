//! Saved state of the socket device, and its check.

use migration_state::Record;
use serde::{Deserialize, Serialize};

use super::connections::FIRST_PORT;
use crate::virtio::DeviceError;

/// Saved state of a [`super::VirtioVsock`]. Connections are not in it: they end with a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's address.
    pub guest_cid: u32,
    /// The port of the next program on the host that connects to the guest.
    pub next_port: u32,
}

impl Record for VsockState {
    const KIND: &'static str = "virtio-vsock";
    const VERSION: u16 = 1;
}

impl VsockState {
    /// Checks that the guest keeps its address, and that the port is one for programs of the host.
    pub(super) fn check(&self, guest_cid: u32) -> Result<(), DeviceError> {
        let mismatch =
            |what, expected: String, got: String| Err(DeviceError::Mismatch { what, expected, got });
        if self.guest_cid != guest_cid {
            return mismatch("CID", guest_cid.to_string(), self.guest_cid.to_string());
        }
        // One past the last port is valid: it stands for the first.
        if !(FIRST_PORT..=2 * FIRST_PORT).contains(&self.next_port) {
            let expected = format!("{FIRST_PORT} to {}", 2 * FIRST_PORT);
            return mismatch("next port of the host", expected, self.next_port.to_string());
        }
        Ok(())
    }
}
