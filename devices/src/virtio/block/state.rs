//! Saved state of the block device, and its check against the disk that is here.

use migration_state::Record;
use serde::{Deserialize, Serialize};

use super::ID_LEN;
use super::backend::BlockBackend;
use crate::virtio::DeviceError;

/// Saved state of a [`super::VirtioBlock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What GET_ID answers, padded with zeroes.
    pub id: [u8; ID_LEN],
    /// Whether a write is done when the host has it in its cache; the guest may choose.
    pub writeback: bool,
}

impl Record for BlockState {
    const KIND: &'static str = "virtio-block";
    const VERSION: u16 = 2;
}

impl BlockState {
    /// Checks that the disk here matches the one that the guest knows.
    pub(super) fn check(&self, backend: &BlockBackend) -> Result<(), DeviceError> {
        let mismatch =
            |what, expected: String, got: String| Err(DeviceError::Mismatch { what, expected, got });
        if self.sectors != backend.sectors() {
            return mismatch(
                "disk size in sectors",
                backend.sectors().to_string(),
                self.sectors.to_string(),
            );
        }
        if self.read_only != backend.read_only() {
            let word = |read_only| if read_only { "read-only" } else { "writable" }.to_owned();
            return mismatch("disk", word(backend.read_only()), word(self.read_only));
        }
        Ok(())
    }
}
