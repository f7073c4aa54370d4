//! The disk as a virtio device: features, configuration space and life cycle.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use migration_state::Envelope;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::backend::BlockBackend;
use super::configuration::{WRITEBACK_AT, configuration};
use super::control::BlockControl;
use super::engine::BlockEngine;
use super::error::BlockRequestError;
use super::metrics::BlockMetrics;
use super::parameters::{BlockParameters, CacheMode};
use super::state::BlockState;
use super::write_out::WriteOut;
use super::{ID_LEN, SECTOR_SIZE};
use crate::log_damper::LogDamper;
use crate::metrics::Counters;
use crate::rate::Limiter;
use crate::virtio::device::{RING_FEATURES, read_bytes};
use crate::virtio::sys::Durability;
use crate::virtio::{
    Description, DeviceError, HostBackend, HostError, QUEUE_SIZE, QueueError, QueueProgress, Queues,
    VirtioDevice,
};

const F_FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const F_RO: u64 = 1 << VIRTIO_BLK_F_RO;
const F_SIZE_MAX: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX;
const F_SEG_MAX: u64 = 1 << VIRTIO_BLK_F_SEG_MAX;
const F_BLK_SIZE: u64 = 1 << VIRTIO_BLK_F_BLK_SIZE;
const F_CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
const F_DISCARD: u64 = 1 << VIRTIO_BLK_F_DISCARD;
const F_WRITE_ZEROES: u64 = 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// A disk.
pub struct VirtioBlock {
    pub(super) engine: BlockEngine,
    pub(super) backend: Arc<BlockBackend>,
    pub(super) id: [u8; ID_LEN],
    pub(super) parameters: BlockParameters,
    pub(super) control: Arc<BlockControl>,
    /// Features that the driver accepted.
    pub(super) accepted: u64,
    /// Whether the cache is on: as the host has set it at first, then as the guest sets it (virtio 1.2, 5.2.5.2).
    pub(super) writeback: bool,
    /// Whether the guest has turned the cache off and cached writes are being written back: no request starts before that
    /// is done.
    pub(super) settling: bool,
    /// The capacity that was reported to the guest last.
    pub(super) sectors: u64,
    pub(super) limiter: Limiter,
    pub(super) write_out: Option<WriteOut>,
    pub(super) metrics: Arc<BlockMetrics>,
    pub(super) warnings: LogDamper,
}

impl VirtioBlock {
    /// A disk on `backend` with the identity `id`, cut off after [`ID_LEN`] bytes. The limits were checked, and the
    /// backend was opened in accordance with the parameters.
    pub fn new(backend: Arc<BlockBackend>, id: &str, parameters: BlockParameters) -> io::Result<Self> {
        let mut padded = [0; ID_LEN];
        for (to, from) in padded.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Ok(Self {
            engine: BlockEngine::new(parameters.engine, &backend)?,
            control: Arc::new(BlockControl::new(backend.clone(), parameters.limits)?),
            id: padded,
            parameters,
            accepted: 0,
            writeback: parameters.cache != CacheMode::Writethrough,
            settling: false,
            sectors: backend.sectors(),
            limiter: Limiter::new(parameters.limits)?,
            write_out: WriteOut::of(&backend)?,
            metrics: Arc::default(),
            warnings: LogDamper::default(),
            backend,
        })
    }

    /// The host's control of the disk.
    pub fn control(&self) -> &Arc<BlockControl> {
        &self.control
    }

    /// What a write must have reached when the guest gets the answer. A guest that cannot flush relies on every write
    /// being durable (virtio 1.2, 5.2.6.2).
    pub(super) fn durability(&self) -> Durability {
        let cached = self.accepted & F_FLUSH != 0 && self.writeback;
        if cached || self.parameters.cache == CacheMode::Unsafe {
            Durability::Cached
        } else {
            Durability::Durable
        }
    }
}

fn host_error(error: BlockRequestError) -> DeviceError {
    DeviceError::Host(HostError::from(error))
}

impl VirtioDevice for VirtioBlock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let by_mode = if self.backend.read_only() {
            F_RO
        } else {
            F_DISCARD | F_WRITE_ZEROES
        };
        let by_cache = if self.backend.read_only() || self.parameters.cache == CacheMode::Unsafe {
            0
        } else {
            F_CONFIG_WCE
        };
        let by_size = if u64::from(self.backend.block_size()) > SECTOR_SIZE {
            F_BLK_SIZE
        } else {
            0
        };
        RING_FEATURES | F_FLUSH | F_SIZE_MAX | F_SEG_MAX | by_mode | by_cache | by_size
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = configuration(&self.backend, self.writeback);
        read_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset != WRITEBACK_AT as u64 || data.len() != 1 || self.accepted & F_CONFIG_WCE == 0 {
            tracing::debug!(offset, ?data, "virtio-block: not writable in the configuration");
            return;
        }
        self.writeback = data != [0];
        if !self.writeback && !self.settling {
            // From now on the guest need not flush, not even its earlier writes. The vCPU does not wait for the flush,
            // but the next requests do.
            match self.engine.start_flush(&self.backend) {
                Ok(begun) => self.settling = begun,
                Err(error) => self.warn(&error),
            }
            if let Err(error) = self.engine.submit() {
                self.warn(&error);
            }
        }
    }

    fn activate(&mut self, features: u64) {
        self.accepted = features;
    }

    fn process_queue(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        let Some(mut queue) = queues.get(index) else {
            return Ok(QueueProgress::Idle);
        };
        let done = self.process_requests(&mut queue);
        if done.is_err() {
            // The device thread does not serve the timer until the driver has reset the device.
            self.start_write_out();
        }
        done
    }

    fn host_events(&self) -> Vec<BorrowedFd<'_>> {
        let write_out = self.write_out.as_ref().map(WriteOut::event);
        let others = [self.limiter.event(), self.control.event()];
        self.engine.events().chain(write_out).chain(others).collect()
    }

    /// I/O is done, the host's control has changed, or a request that waited for tokens can go on.
    fn process_host(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        self.limiter.clear_event();
        if self.write_out.as_ref().is_some_and(WriteOut::is_due) {
            self.start_write_out();
        }
        self.apply_control(queues);
        self.process_queue(0, queues)
    }

    fn reset(&mut self) -> bool {
        self.accepted = 0;
        self.writeback = self.parameters.cache != CacheMode::Writethrough;
        self.settling = false;
        if !self.engine.cancel(&self.backend) {
            return false;
        }
        // The device thread does not serve the timer until a driver is ready again.
        self.start_write_out();
        true
    }

    fn drain(&mut self, queues: &mut Queues<'_>, until: Instant) -> Result<(), DeviceError> {
        // A change that is not applied now would be lost with the move.
        self.apply_control(queues);
        let broken = self.drain_in_flight(queues, until)?;
        if !self.backend.read_only() {
            self.engine.start_flush(&self.backend).map_err(host_error)?;
            self.drain_in_flight(queues, until)?;
            if !self.backend.is_durable() {
                // The failure was logged when it happened.
                return Err(DeviceError::NotDurable);
            }
        }
        // The writes are durable, also if the queue is broken.
        broken.map_or(Ok(()), |broken| Err(broken.into()))
    }

    fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let state = BlockState {
            sectors: self.backend.sectors(),
            read_only: self.backend.read_only(),
            id: self.id,
            writeback: self.writeback,
        };
        Ok(envelope.put(instance, &state)?)
    }

    fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let state: BlockState = envelope.take(instance)?;
        state.check(&self.backend)?;
        self.id = state.id;
        self.writeback = state.writeback;
        Ok(())
    }

    fn describe(&self) -> Description {
        Description {
            backend_size: self.backend.size(),
            read_only: self.backend.read_only(),
            parameters: BlockParameters {
                limits: self.control.limits(),
                ..self.parameters
            }
            .to_bytes(),
            ..Description::of::<BlockState>(self.features())
        }
    }

    fn metrics(&self) -> Arc<dyn Counters> {
        self.metrics.clone()
    }

    fn host_backend(&self) -> Option<Arc<dyn HostBackend>> {
        Some(self.backend.clone())
    }
}
