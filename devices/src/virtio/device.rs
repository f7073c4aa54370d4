//! The interface between a virtio device and its transport, and that of a device's backend on the host.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use migration_state::{Envelope, Record, StateError};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::queue::{QueueError, QueueProgress, Queues};
use crate::metrics::Counters;

/// Features of the queue code, which every device offers.
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
/// The transport owns the queues, the feature negotiation and the interrupt; it lends the queues for the time of one
/// [`VirtioDevice::process_queue`], [`VirtioDevice::process_host`] or [`VirtioDevice::drain`]. Work that a device has
/// in flight between two calls is finished by `drain`, which comes before a save, and ended by a reset and by dropping
/// the device.
pub trait VirtioDevice: Send {
    /// The device ID (virtio 1.2, 5).
    fn device_type(&self) -> u32;

    /// The features that it offers, without those that are the transport's own (VERSION_1).
    fn features(&self) -> u64;

    /// The maximum size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from the configuration space at `offset`; zeroes beyond its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Handles a write to the configuration space.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver is ready (DRIVER_OK) and accepted `features`; also called after a restore.
    fn activate(&mut self, features: u64);

    /// Serves chains of the queue `index`. An error means that the queue itself is broken: the device then needs a
    /// reset. An error of a single request is reported to the guest in that request.
    fn process_queue(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError>;

    /// Descriptors of the host that become readable when something happens on the device's host side. The device thread
    /// watches them edge-triggered and then calls [`VirtioDevice::process_host`].
    fn host_events(&self) -> Vec<BorrowedFd<'_>>;

    /// Serves the device's host side: after one of [`VirtioDevice::host_events`], and whenever an event may have been
    /// missed, which is when the driver becomes ready and after a pause or a restore. The device handles all that is
    /// there, or returns [`QueueProgress::More`].
    fn process_host(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError>;

    /// Returns to the state before [`VirtioDevice::activate`]. Returns whether all earlier writes to guest memory have
    /// ended: if not, the transport calls this again.
    fn reset(&mut self) -> bool;

    /// Finishes work in flight and makes every write that was answered durable. Fails if that takes longer than
    /// `until`; the device can then go on.
    fn drain(&mut self, queues: &mut Queues<'_>, until: Instant) -> Result<(), DeviceError>;

    /// Adds the device's saved state to `envelope`.
    fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError>;

    /// Takes the device's saved state out of `envelope`. The state is untrusted. [`VirtioDevice::activate`] follows if
    /// the driver had set DRIVER_OK.
    fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError>;

    /// What a destination must know of the device to build a matching one.
    fn describe(&self) -> Description;

    /// The device's backend on the host; `None` if it has none that a migration must lock or flush.
    fn host_backend(&self) -> Option<Arc<dyn HostBackend>>;

    /// The device's counters. They begin with the process: they are not in the saved state, and no reset clears them.
    fn metrics(&self) -> Arc<dyn Counters>;
}

/// What a destination must know of a device to build a matching one on a backend of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// The kind of its saved state, e.g. `virtio-block`.
    pub kind: &'static str,
    /// The version of its saved state.
    pub version: u16,
    /// The features that it offers, as [`VirtioDevice::features`] says.
    pub features: u64,
    /// Size of the backend in bytes; 0 if it has no size.
    pub backend_size: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// The device's parameters, in a form that only its kind knows. Empty for most kinds.
    pub parameters: Vec<u8>,
}

impl Description {
    /// Describes a device whose saved state is an `R` and that offers `features`; everything else is empty.
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

/// A device's backend on the host, which only one host may use at a time.
///
/// The calls may come from any thread, also while the guest uses the device.
pub trait HostBackend: Send + Sync {
    /// Takes the locks that keep other processes from using it.
    fn take_locks(&self) -> Result<(), HostError>;

    /// Releases the locks.
    fn release_locks(&self) -> Result<(), HostError>;

    /// Makes everything that was written durable and visible to other hosts.
    fn flush(&self) -> Result<(), HostError>;

    /// Drops everything cached, so that nothing read before is used after another host wrote.
    fn invalidate(&self) -> Result<(), HostError>;
}

/// An error of a backend: one line that names it, what was expected and what was found.
pub type HostError = Box<dyn std::error::Error + Send + Sync>;

/// Why a device cannot be drained, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The saved state cannot be read or written.
    #[error("saved state of the device")]
    State(#[from] StateError),
    /// A queue with work in flight is broken.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The backend failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Work in flight takes too long.
    #[error("{what}: expected what it has begun to be over in time, but it is not")]
    InFlight {
        /// What is still in flight.
        what: String,
    },
    /// A write that was answered may be lost if the host fails.
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
