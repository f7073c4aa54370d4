//! Why a transport cannot be built, saved or restored.

use std::io;

use migration_state::StateError;

use crate::virtio::DeviceError;

/// Why a transport cannot be built, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum MmioTransportError {
    /// No file descriptor for kicks.
    #[error("virtio device {device}: cannot make an event for its kicks")]
    Event {
        /// The device ID.
        device: u32,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Saving or restoring while queues are served.
    #[error("virtio device {device}: expected it to be paused, but it is running")]
    NotPaused {
        /// The device ID.
        device: u32,
    },
    /// The transport's saved state cannot be read or written.
    #[error("virtio device {device}: saved state of the transport")]
    State {
        /// The device ID.
        device: u32,
        /// The cause.
        #[source]
        source: StateError,
    },
    /// The saved state does not fit the device that is here.
    #[error("virtio device {device}: {what} in the saved state: expected {expected}, got {got}")]
    Mismatch {
        /// The device ID.
        device: u32,
        /// What differs.
        what: &'static str,
        /// What the device here allows.
        expected: String,
        /// What the saved state says.
        got: String,
    },
    /// A queue in the saved state cannot be served.
    #[error("virtio device {device}: queue {index} in the saved state: {reason}")]
    Queue {
        /// The device ID.
        device: u32,
        /// The queue.
        index: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The device itself failed.
    #[error("virtio device {device}: {source}")]
    Device {
        /// The device ID.
        device: u32,
        /// The cause.
        #[source]
        source: DeviceError,
    },
}
