//! Saved state of a transport, and the checks that it passes before it becomes live.

use migration_state::Record;
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

use super::error::MmioTransportError;
use super::registers::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, EVENT_IDX, FAILED, FEATURES_OK, NEEDS_RESET, VERSION_1,
};
use crate::GuestMemory;
use crate::virtio::interrupt::{CONFIG_CHANGE, USED_BUFFER};

/// Saved state of a [`super::MmioTransport`], without its device's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioTransportState {
    /// The device ID.
    pub device_type: u32,
    /// The device status register.
    pub status: u8,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// The DeviceFeaturesSel register.
    pub device_features_select: u32,
    /// The DriverFeaturesSel register.
    pub driver_features_select: u32,
    /// The QueueSel register.
    pub queue_select: u32,
    /// The InterruptStatus register.
    pub interrupt_status: u32,
    /// The ConfigGeneration register.
    pub config_generation: u32,
    /// Every queue of the device, in order.
    pub queues: Vec<QueueRecord>,
}

/// Saved state of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRecord {
    /// Largest size that the device offers, in descriptors.
    pub max_size: u16,
    /// Size that the driver chose.
    pub size: u16,
    /// Whether the driver uses it.
    pub ready: bool,
    /// Next entry of the available ring to pop.
    pub next_avail: u16,
    /// Next entry of the used ring to write.
    pub next_used: u16,
    /// GPA of the descriptor table.
    pub descriptor_table: u64,
    /// GPA of the available ring.
    pub available_ring: u64,
    /// GPA of the used ring.
    pub used_ring: u64,
}

impl Record for MmioTransportState {
    const KIND: &'static str = "virtio-mmio";
    const VERSION: u16 = 1;
}

/// Why a queue's registers do not describe a valid queue.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayoutError {
    #[error("expected an aligned layout and a power of two as size")]
    Parameters(#[source] virtio_queue::Error),
    #[error("expected its rings inside guest memory")]
    OutsideMemory,
}

impl QueueRecord {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ready: false,
            next_avail: 0,
            next_used: 0,
            descriptor_table: 0,
            available_ring: 0,
            used_ring: 0,
        }
    }

    /// The queue that the registers describe; `None` if the driver does not use it.
    pub(super) fn open(&self, features: u64, memory: &GuestMemory) -> Result<Option<Queue>, LayoutError> {
        if !self.ready {
            return Ok(None);
        }
        let queue = Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: features & EVENT_IDX != 0,
            size: self.size,
            ready: true,
            desc_table: self.descriptor_table,
            avail_ring: self.available_ring,
            used_ring: self.used_ring,
        })
        .map_err(LayoutError::Parameters)?;
        // `virtio-queue` takes address 0 for "not set".
        if self.available_ring == 0 || !queue.is_valid(memory) {
            return Err(LayoutError::OutsideMemory);
        }
        Ok(Some(queue))
    }

    /// The same record with the positions that the live queue has reached.
    pub(super) fn at(self, queue: &Queue) -> Self {
        Self {
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
            ..self
        }
    }
}

impl MmioTransportState {
    /// Whether the device serves its queues.
    pub(super) fn is_active(&self) -> bool {
        self.status & DRIVER_OK != 0 && self.status & (NEEDS_RESET | FAILED) == 0
    }

    /// Checks the state against the device that is here, whose features (`offered`) and `queues` are known.
    pub(super) fn check(
        &self,
        device_type: u32,
        offered: u64,
        queues: &[QueueRecord],
    ) -> Result<(), MmioTransportError> {
        let mismatch = |what, expected: String, got: String| {
            Err(MmioTransportError::Mismatch {
                device: device_type,
                what,
                expected,
                got,
            })
        };
        if self.device_type != device_type {
            return mismatch("device ID", device_type.to_string(), self.device_type.to_string());
        }
        let known = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;
        let negotiated = self.status & FEATURES_OK != 0;
        if self.status & !known != 0 || (self.status & DRIVER_OK != 0 && !negotiated) {
            return mismatch(
                "device status",
                "a reachable one".into(),
                format!("{:#x}", self.status),
            );
        }
        let excess = self.driver_features & !offered;
        if negotiated && (excess != 0 || self.driver_features & VERSION_1 == 0) {
            let got = format!("{:#x}", self.driver_features);
            return mismatch("features", format!("VERSION_1 and a subset of {offered:#x}"), got);
        }
        if self.interrupt_status & !(USED_BUFFER | CONFIG_CHANGE) != 0 {
            return mismatch(
                "interrupt status",
                "0 to 3".into(),
                format!("{:#x}", self.interrupt_status),
            );
        }
        let sizes = |queues: &[QueueRecord]| queues.iter().map(|queue| queue.max_size).collect::<Vec<_>>();
        if sizes(&self.queues) != sizes(queues) {
            let got = format!("{:?}", sizes(&self.queues));
            return mismatch("maximum queue sizes", format!("{:?}", sizes(queues)), got);
        }
        Ok(())
    }
}
