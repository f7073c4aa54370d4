//! The device: requests from one queue, carried out in order on the device thread.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use migration_state::Envelope;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{Bytes, GuestAddress};

use super::ID_LEN;
use super::backend::Backend;
use super::metrics::BlockMetrics;
use super::request::{Disk, MOST_DISCARDED, MOST_ZEROED, OK, Request, RequestError};
use super::state::BlockState;
use crate::GuestMemory;
use crate::limited::Limited;
use crate::metrics::Counters;
use crate::rate::{Limiter, Limits};
use crate::virtio::device::{RING_FEATURES, read_bytes};
use crate::virtio::{
    Chain, ChainError, Description, DeviceError, HostBackend, HostError, Progress, QUEUE_SIZE, QueueError,
    Queues, Served, VirtioDevice,
};

const F_FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const F_RO: u64 = 1 << VIRTIO_BLK_F_RO;
const F_SEG_MAX: u64 = 1 << VIRTIO_BLK_F_SEG_MAX;
const F_DISCARD: u64 = 1 << VIRTIO_BLK_F_DISCARD;
const F_WRITE_ZEROES: u64 = 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// Data buffers in one request: a queue's worth without header and status byte.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// The configuration space (virtio 1.2, 5.2.4). What is not set here is not offered.
const CONFIG_LEN: usize = 60;
const CAPACITY: usize = 0;
const MAX_SEGMENTS: usize = 12;
const MAX_DISCARD_SECTORS: usize = 36;
const MAX_DISCARD_SEGMENTS: usize = 40;
const DISCARD_ALIGNMENT: usize = 44;
const MAX_ZEROES_SECTORS: usize = 48;
const MAX_ZEROES_SEGMENTS: usize = 52;
const ZEROES_MAY_UNMAP: usize = 56;
/// Discarded ranges begin and end with pages of the host, or their space is not given up.
const HOST_PAGE_SECTORS: u32 = 8;

/// A disk.
#[derive(Debug)]
pub struct Block {
    backend: Arc<Backend>,
    id: [u8; ID_LEN],
    /// The driver did not accept FLUSH, so it counts on every write being durable (virtio 1.2, 5.2.6.2).
    pub(super) write_through: bool,
    limiter: Limiter,
    metrics: Arc<BlockMetrics>,
    complaints: Limited,
}

impl Block {
    /// A disk on `backend` that calls itself `id`; what is beyond [`ID_LEN`] bytes is cut. The limits were checked.
    pub fn new(backend: Arc<Backend>, id: &str, limits: Limits) -> io::Result<Self> {
        let mut padded = [0; ID_LEN];
        for (to, from) in padded.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Ok(Self {
            backend,
            id: padded,
            write_through: false,
            limiter: Limiter::new(limits)?,
            metrics: Arc::default(),
            complaints: Limited::default(),
        })
    }

    /// What it is on.
    pub fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }

    fn admit(&self, bytes: u64) -> bool {
        let admitted = self.limiter.take(bytes);
        if !admitted {
            self.metrics.throttled.add(1);
        }
        admitted
    }

    fn serve(&self, memory: &GuestMemory, chain: Result<Chain, ChainError>) -> Served {
        let chain = match chain {
            Ok(chain) => chain,
            Err(error) => {
                self.complain(&error);
                return Served::default();
            }
        };
        let disk = Disk {
            backend: &self.backend,
            id: &self.id,
            write_through: self.write_through,
        };
        match Request::parse(memory, chain) {
            Ok(request) => {
                let (status, kind, data) = (request.status, request.kind, request.len());
                match request.execute(memory, &disk) {
                    Ok(served) => {
                        self.limiter.charge(served.work);
                        self.metrics.done(kind, data.max(served.work));
                        self.finish(memory, status, OK, served)
                    }
                    Err(error) => self.fail(memory, status, &error),
                }
            }
            Err((Some(status), error)) => self.fail(memory, status, &error),
            Err((None, error)) => {
                self.complain(&error);
                Served::default()
            }
        }
    }

    fn fail(&self, memory: &GuestMemory, status: GuestAddress, error: &RequestError) -> Served {
        self.complain(error);
        self.finish(memory, status, error.status(), Served::default())
    }

    fn finish(&self, memory: &GuestMemory, status: GuestAddress, value: u8, served: Served) -> Served {
        match memory.write_obj(value, status) {
            Ok(()) => Served {
                written: served.written.saturating_add(1),
                ..served
            },
            Err(error) => {
                self.complain(&error);
                served
            }
        }
    }

    fn complain(&self, error: &dyn std::error::Error) {
        self.metrics.failed.add(1);
        if let Some(count) = self.complaints.count() {
            let disk = self.backend.path().display();
            tracing::warn!(%disk, count, "virtio-block: request failed: {error}");
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let by_mode = if self.backend.read_only() {
            F_RO
        } else {
            F_DISCARD | F_WRITE_ZEROES
        };
        RING_FEATURES | F_FLUSH | F_SEG_MAX | by_mode
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_LEN];
        config[CAPACITY..][..8].copy_from_slice(&self.backend.sectors().to_le_bytes());
        for (at, value) in [
            (MAX_SEGMENTS, SEG_MAX),
            (MAX_DISCARD_SECTORS, MOST_DISCARDED),
            (MAX_DISCARD_SEGMENTS, 1),
            (DISCARD_ALIGNMENT, HOST_PAGE_SECTORS),
            (MAX_ZEROES_SECTORS, MOST_ZEROED),
            (MAX_ZEROES_SEGMENTS, 1),
            (ZEROES_MAY_UNMAP, 1),
        ] {
            config[at..][..4].copy_from_slice(&value.to_le_bytes());
        }
        read_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        tracing::debug!(
            offset,
            len = data.len(),
            "virtio-block: nothing in the configuration is writable"
        );
    }

    fn activate(&mut self, features: u64) {
        self.write_through = features & F_FLUSH == 0;
    }

    fn process_queue(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        let Some(mut queue) = queues.get(index) else {
            return Ok(Progress::Idle);
        };
        queue.serve_admitted(
            |bytes| self.admit(bytes),
            |memory, chain| self.serve(memory, chain),
        )
    }

    fn host_events(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.limiter.event()]
    }

    /// There may be tokens again for what could not be served.
    fn process_host(&mut self, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        self.limiter.hear();
        self.process_queue(0, queues)
    }

    fn reset(&mut self) {
        self.write_through = false;
    }

    fn drain(&mut self) -> Result<(), DeviceError> {
        if self.backend.read_only() {
            return Ok(());
        }
        self.backend
            .flush()
            .map_err(|error| DeviceError::Host(HostError::from(error)))
    }

    fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let state = BlockState {
            sectors: self.backend.sectors(),
            read_only: self.backend.read_only(),
            id: self.id,
        };
        Ok(envelope.put(instance, &state)?)
    }

    fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let state: BlockState = envelope.take(instance)?;
        state.check(&self.backend)?;
        self.id = state.id;
        Ok(())
    }

    fn describe(&self) -> Description {
        Description {
            backend_size: self.backend.size(),
            read_only: self.backend.read_only(),
            parameters: self.limiter.limits().to_bytes(),
            ..Description::of::<BlockState>(self.features())
        }
    }

    fn host_backend(&self) -> Option<Arc<dyn HostBackend>> {
        Some(self.backend.clone())
    }

    fn metrics(&self) -> Arc<dyn Counters> {
        self.metrics.clone()
    }
}
