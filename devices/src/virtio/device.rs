//! What a virtio device is to its transport, and what backs it on the host.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use migration_state::{Envelope, Record, StateError};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::queue::{QueueError, QueueProgress, Queues};
use crate::metrics::Counters;

/// Features of the queue code that every device here shares.
pub(super) const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Fills `data` from a configuration space that is `config`, at `offset`; zeroes beyond its end.
pub(super) fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let tail = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..));
    for (to, from) in data.iter_mut().zip(tail.unwrap_or_default()) {
        *to = *from;
    }
}

/// A virtio device behind a transport.
///
/// The transport owns the queues, the feature negotiation and the interrupt; it lends the queues for the time of
/// one [`VirtioDevice::process_queue`], [`VirtioDevice::process_host`] or [`VirtioDevice::drain`]. What a device has in
/// flight between two calls is finished by `drain`, which comes before it is saved, and ended by a reset and when it is
/// dropped.
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
    fn process_queue(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError>;

    /// Descriptors of the host that become readable when the device's other side has something to say. The device
    /// thread hears of each change, not of what stays as it is: see [`VirtioDevice::process_host`].
    fn host_events(&self) -> Vec<BorrowedFd<'_>>;

    /// Looks at the other side: after one of [`VirtioDevice::host_events`], and whenever events may have gone
    /// unheard, which is when the driver is ready and after a pause or a restore. Leaves nothing there that it
    /// could take, or says [`QueueProgress::More`].
    fn process_host(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError>;

    /// Back to the state before [`VirtioDevice::activate`]. Whether nothing writes to memory any more that began before: if
    /// not, this is called again in time. A disk waits half a second for that at most.
    fn reset(&mut self) -> bool;

    /// Finishes work in flight and makes what the guest was told is done durable. If that is not over by `until` it fails,
    /// and the device can go on with it.
    fn drain(&mut self, queues: &mut Queues<'_>, until: Instant) -> Result<(), DeviceError>;

    /// Adds the device's saved state to `envelope`.
    fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError>;

    /// Takes the device's saved state out of `envelope`. Untrusted. [`VirtioDevice::activate`] follows if the
    /// guest had got that far.
    fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError>;

    /// What somebody must know of the device to build its like.
    fn describe(&self) -> Description;

    /// What backs the device on the host; `None` if nothing does that a migration must care about.
    fn host_backend(&self) -> Option<Arc<dyn HostBackend>>;

    /// What it counts. Counts begin with the process: they are no part of the saved state, and no reset clears them.
    fn metrics(&self) -> Arc<dyn Counters>;
}

/// What a destination must know of a device to build its like, with other things of the host behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// The kind of its saved state, e.g. `virtio-block`.
    pub kind: &'static str,
    /// The version of its saved state.
    pub version: u16,
    /// The features that it offers, as [`VirtioDevice::features`] says.
    pub features: u64,
    /// Size of what is behind it in bytes, where that has a size, else 0.
    pub backend_size: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What the device was made with: bytes that mean something to its kind alone. Empty for most.
    pub parameters: Vec<u8>,
}

impl Description {
    /// A device whose saved state is an `R`, with nothing else to say than the `features` that it offers.
    pub fn of<R: Record>(features: u64) -> Self {
        Self {
            kind: R::KIND,
            version: R::VERSION,
            features,
            backend_size: 0,
            read_only: false,
            parameters: Vec::new(),
        }
    }
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
    /// A queue that work in flight belongs to is broken.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The backend failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Work in flight takes too long.
    #[error("{what}: expected what it has begun to be over in time, but it is not")]
    InFlight {
        /// Whatever is at work.
        what: String,
    },
    /// What the guest was told is done may be lost with the host.
    #[error(
        "expected what was written to be durable, but it could not be written back; the guest is told with its next flush"
    )]
    NotDurable,
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
