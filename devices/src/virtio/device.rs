//! What a virtio device is to its transport, and what backs it on the host.

use std::sync::Arc;

use migration_state::{Envelope, StateError};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::queue::{Progress, QueueAccess, QueueError};

/// Features of the queue code that every device here shares.
pub(super) const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// A virtio device behind a transport.
///
/// The transport owns the queues, the feature negotiation and the interrupt; it lends a queue for the time of
/// one [`VirtioDevice::process_queue`]. Between two calls a device has no request in flight, so that whoever
/// holds the device may stop, save or reset it.
pub trait VirtioDevice: Send {
    /// The device ID (virtio 1.2, 5).
    fn device_type(&self) -> u32;

    /// The features that it offers, without those that are the transport's own (VERSION_1).
    fn features(&self) -> u64;

    /// The maximum size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from the configuration space at `offset`; zeroes beyond its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes a write to the configuration space.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver is ready (DRIVER_OK) and accepted `features`; also called after a restore.
    fn activate(&mut self, features: u64);

    /// Serves chains of the queue `index`. An error means that the queue itself is broken: the device then
    /// needs a reset. What is wrong with one request is told to the guest in that request.
    fn process_queue(&mut self, index: usize, queue: &mut QueueAccess<'_>) -> Result<Progress, QueueError>;

    /// Back to the state before [`VirtioDevice::activate`].
    fn reset(&mut self);

    /// Finishes work in flight and makes what the guest was told is done durable.
    fn drain(&mut self) -> Result<(), DeviceError>;

    /// Adds the device's saved state to `envelope`.
    fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError>;

    /// Takes the device's saved state out of `envelope`. Untrusted. [`VirtioDevice::activate`] follows if the
    /// guest had got that far.
    fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError>;

    /// What backs the device on the host; `None` if nothing does that a migration must care about.
    fn host_backend(&self) -> Option<Arc<dyn HostBackend>>;
}

/// What backs a device on the host and may be in use by one host only.
///
/// The calls may come from any thread, also while the guest uses the device.
pub trait HostBackend: Send + Sync {
    /// Takes the locks that keep others from using it.
    fn take_locks(&self) -> Result<(), HostError>;

    /// Gives them up.
    fn release_locks(&self) -> Result<(), HostError>;

    /// Makes all that was written durable and visible to other hosts.
    fn flush(&self) -> Result<(), HostError>;

    /// Drops everything cached, so that nothing read before is used after another host wrote.
    fn invalidate(&self) -> Result<(), HostError>;
}

/// An error of what backs a device: one line that names it, what was expected and what came.
pub type HostError = Box<dyn std::error::Error + Send + Sync>;

/// Why a device cannot be drained, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The saved state cannot be read or written.
    #[error("saved state of the device")]
    State(#[from] StateError),
    /// The backend failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The saved state does not fit the device that is here.
    #[error("saved state of the device: {what}: expected {expected}, got {got}")]
    Mismatch {
        /// What differs.
        what: &'static str,
        /// What the device here has.
        expected: String,
        /// What the saved state says.
        got: String,
    },
}
