//! The device: requests from one queue, taken on the device thread, and answered as they are done.

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
use vm_memory::{Bytes, GuestAddress};

use super::backend::BlockBackend;
use super::configuration::{WRITEBACK, configuration};
use super::control::BlockControl;
use super::engine::{BlockEngine, Origin, Ticket};
use super::error::BlockRequestError;
use super::metrics::BlockMetrics;
use super::parameters::{BlockParameters, CacheMode};
use super::request::{BlockRequest, OK, RequestStep, RequestTarget};
use super::state::BlockState;
use super::write_out::WriteOut;
use super::{ID_LEN, SECTOR_SIZE};
use crate::GuestMemory;
use crate::log_damper::LogDamper;
use crate::metrics::Counters;
use crate::rate::Limiter;
use crate::virtio::device::{RING_FEATURES, read_bytes};
use crate::virtio::sys::Durability;
use crate::virtio::{
    Chain, ChainError, ChainHead, Description, DeviceError, HostBackend, HostError, QUEUE_SIZE, QueueAccess,
    QueueError, QueueProgress, Queues, Served, Turn, VirtioDevice,
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
    engine: BlockEngine,
    pub(super) backend: Arc<BlockBackend>,
    id: [u8; ID_LEN],
    parameters: BlockParameters,
    control: Arc<BlockControl>,
    /// Features that the driver accepted.
    accepted: u64,
    /// The cache as the guest wants it (virtio 1.2, 5.2.5.2), and at first as the host does.
    writeback: bool,
    /// The guest has turned the cache off, and what was cached is being written back: no request begins before.
    settling: bool,
    /// The capacity that the guest was told of last.
    sectors: u64,
    limiter: Limiter,
    write_out: Option<WriteOut>,
    metrics: Arc<BlockMetrics>,
    warnings: LogDamper,
}

impl VirtioBlock {
    /// A disk on `backend` that calls itself `id`; what is beyond [`ID_LEN`] bytes is cut. The limits were checked, and
    /// the backend was opened as the parameters say.
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

    /// What is on the host's side.
    pub fn control(&self) -> &Arc<BlockControl> {
        &self.control
    }

    /// What a write must be when the guest hears that it is done. A guest that cannot flush counts on every write being
    /// durable (virtio 1.2, 5.2.6.2).
    pub(super) fn durability(&self) -> Durability {
        let cached = self.accepted & F_FLUSH != 0 && self.writeback;
        if cached || self.parameters.cache == CacheMode::Unsafe {
            Durability::Cached
        } else {
            Durability::Durable
        }
    }

    /// Takes chains and answers those that are done, until nothing is left that could be done now, or others are to
    /// have a turn.
    fn process_requests(&mut self, queue: &mut QueueAccess<'_>) -> Result<QueueProgress, QueueError> {
        let (mut turn, mut answered) = (Turn::default(), 0);
        let progress = loop {
            let before = answered;
            self.start_requests(queue, &mut turn, &mut answered)?;
            self.complete_requests(queue, &mut answered)?;
            if turn.is_over() || self.engine.is_queued() {
                break QueueProgress::More;
            }
            // The driver sees the answers, and may have more by now.
            if answered == before {
                break QueueProgress::Idle;
            }
        };
        if answered > 0 {
            queue.notify()?;
        }
        self.schedule_write_out();
        Ok(progress)
    }

    fn start_requests(
        &mut self,
        queue: &mut QueueAccess<'_>,
        turn: &mut Turn,
        answered: &mut u64,
    ) -> Result<(), QueueError> {
        while !turn.is_over() && self.engine.has_room() && !self.settling {
            let Some((head, chain)) = queue.pop()? else { break };
            let len = chain.as_ref().map_or(0, Chain::len);
            if !self.limiter.try_consume(len) {
                self.metrics.throttled.add(1);
                queue.undo_pop();
                break;
            }
            let served = self.start_request(queue.memory(), head, chain);
            turn.count(len);
            if let Some(served) = served {
                queue.add_used(head, served.written)?;
                *answered += 1;
            }
        }
        Ok(())
    }

    /// Answers what is done, and sees to it that what is not goes on.
    fn complete_requests(
        &mut self,
        queue: &mut QueueAccess<'_>,
        answered: &mut u64,
    ) -> Result<(), QueueError> {
        loop {
            if let Err(error) = self.engine.submit() {
                self.warn(&error);
            }
            let before = *answered;
            while let Some((origin, result)) = self.engine.next(&self.backend) {
                if let Origin::Guest(ticket) = origin {
                    let written = self.complete_guest(queue.memory(), ticket, result);
                    queue.add_used(ticket.head, written)?;
                } else {
                    self.complete_own(origin, result);
                }
                *answered += 1;
            }
            // Done in part, it was queued again.
            if !self.engine.is_queued() || *answered == before {
                return Ok(());
            }
        }
    }

    /// What the device itself wanted is done.
    fn complete_own(&mut self, origin: Origin, result: Result<u32, BlockRequestError>) {
        match origin {
            Origin::Guest(_) => return,
            Origin::Flush => self.settling = false,
            Origin::WriteOut => self.set_write_out_running(false),
        }
        if let Err(error) = result {
            self.warn(&error);
        }
    }

    /// Begins to write out where an image has its data, if any of that is in this process alone.
    fn start_write_out(&mut self) {
        let begun = self.engine.start_write_out(&self.backend);
        self.set_write_out_running(matches!(begun, Ok(true)));
        if let Err(error) = begun {
            self.warn(&error);
        }
    }

    fn set_write_out_running(&mut self, is_running: bool) {
        if let Some(write_out) = &mut self.write_out {
            write_out.set_running(is_running);
        }
        self.schedule_write_out();
    }

    /// Unless it is under way, sees to it that there is a time for it.
    fn schedule_write_out(&mut self) {
        if let Some(Err(error)) = self.write_out.as_mut().map(|due| due.schedule(&self.backend)) {
            self.warn(&error);
        }
    }

    /// Takes over what was changed on the host's side.
    fn apply_control(&mut self, queues: &Queues<'_>) {
        if !self.control.clear_event() {
            return;
        }
        let limits = self.control.limits();
        if limits != self.parameters.limits {
            self.parameters.limits = limits;
            self.limiter.set(limits);
        }
        let sectors = self.backend.sectors();
        if std::mem::replace(&mut self.sectors, sectors) != sectors {
            queues.config_changed();
        }
    }

    /// Waits until nothing is in flight, and answers it. Returns why the queue is broken, if it is: then, and where the
    /// driver has reset the device, what is in flight ends and nobody hears of it.
    fn drain_in_flight(
        &mut self,
        queues: &mut Queues<'_>,
        until: Instant,
    ) -> Result<Option<QueueError>, DeviceError> {
        let mut broken = None;
        while !self.engine.is_empty() {
            match queues.get(0) {
                Some(mut queue) if broken.is_none() => {
                    let done = self
                        .complete_requests(&mut queue, &mut 0)
                        .and_then(|()| queue.notify());
                    broken = done.err();
                }
                _ => self.complete_unanswered().map_err(HostError::from)?,
            }
            if !self.engine.is_empty() {
                if Instant::now() >= until {
                    let disk = self.backend.path().display().to_string();
                    return Err(DeviceError::InFlight { what: disk });
                }
                self.engine.wait(until).map_err(HostError::from)?;
            }
        }
        Ok(broken)
    }

    /// Takes what is done and tells no guest. What the device itself wanted is no less needed for that.
    fn complete_unanswered(&mut self) -> io::Result<()> {
        self.engine.submit()?;
        while let Some((origin, result)) = self.engine.next_unanswered(&self.backend) {
            self.complete_own(origin, result);
        }
        Ok(())
    }

    fn complete_guest(
        &self,
        memory: &GuestMemory,
        ticket: Ticket,
        result: Result<u32, BlockRequestError>,
    ) -> u32 {
        match result {
            Ok(written) => {
                self.metrics.done(ticket.kind, ticket.data);
                self.write_status(memory, ticket.status, OK, written.into())
                    .written
            }
            Err(error) => self.fail_request(memory, ticket.status, &error).written,
        }
    }

    /// Begins a request; what came of it, if it is done.
    fn start_request(
        &mut self,
        memory: &GuestMemory,
        head: ChainHead,
        chain: Result<Chain, ChainError>,
    ) -> Option<Served> {
        let chain = match chain {
            Ok(chain) => chain,
            Err(error) => {
                self.warn(&error);
                return Some(Served::default());
            }
        };
        let request = match BlockRequest::parse(memory, chain) {
            Ok(request) => request,
            Err((Some(status), error)) => return Some(self.fail_request(memory, status, &error)),
            Err((None, error)) => {
                self.warn(&error);
                return Some(Served::default());
            }
        };
        let mut ticket = Ticket {
            head,
            status: request.status,
            kind: request.kind,
            data: request.len(),
        };
        let disk = RequestTarget {
            backend: &self.backend,
            id: &self.id,
            cache: self.parameters.cache,
            durability: self.durability(),
        };
        let served = match request.execute(memory, &disk) {
            Ok(RequestStep::Done(served)) => Ok(served),
            Ok(RequestStep::Transfer(io)) => {
                if let Some(range) = io.range() {
                    // The request itself names it only.
                    ticket.data = range;
                    self.limiter.consume_bytes(range);
                }
                match self.engine.start(memory, &self.backend, ticket, io) {
                    Ok(Some(written)) => Ok(written.into()),
                    Ok(None) => return None,
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        };
        Some(match served {
            Ok(served) => {
                self.metrics.done(ticket.kind, ticket.data);
                self.write_status(memory, ticket.status, OK, served)
            }
            Err(error) => self.fail_request(memory, ticket.status, &error),
        })
    }

    fn fail_request(&self, memory: &GuestMemory, status: GuestAddress, error: &BlockRequestError) -> Served {
        self.warn(error);
        self.write_status(memory, status, error.status(), Served::default())
    }

    fn write_status(&self, memory: &GuestMemory, status: GuestAddress, value: u8, served: Served) -> Served {
        match memory.write_obj(value, status) {
            Ok(()) => Served {
                written: served.written.saturating_add(1),
                ..served
            },
            Err(error) => {
                self.warn(&error);
                served
            }
        }
    }

    fn warn(&self, error: &dyn std::error::Error) {
        self.metrics.failed.add(1);
        if let Some(count) = self.warnings.count() {
            let disk = self.backend.path().display();
            tracing::warn!(%disk, count, "virtio-block: request failed: {error}");
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
        if offset != WRITEBACK as u64 || data.len() != 1 || self.accepted & F_CONFIG_WCE == 0 {
            tracing::debug!(offset, ?data, "virtio-block: not writable in the configuration");
            return;
        }
        self.writeback = data != [0];
        if !self.writeback && !self.settling {
            // From here on the guest need not flush, nor what it wrote before. No vCPU waits for that, but what it asks of
            // the disk next does.
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
            // Nobody looks at the time until the driver has reset the device.
            self.start_write_out();
        }
        done
    }

    fn host_events(&self) -> Vec<BorrowedFd<'_>> {
        let write_out = self.write_out.as_ref().map(WriteOut::event);
        let others = [self.limiter.event(), self.control.event()];
        self.engine.events().chain(write_out).chain(others).collect()
    }

    /// Something is done, or has changed, or there are tokens again for what could not be served.
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
        // Nobody looks at the time until there is a driver again.
        self.start_write_out();
        true
    }

    fn drain(&mut self, queues: &mut Queues<'_>, until: Instant) -> Result<(), DeviceError> {
        // Or nobody would hear of it where the device is restored.
        self.apply_control(queues);
        let broken = self.drain_in_flight(queues, until)?;
        if !self.backend.read_only() {
            self.engine.start_flush(&self.backend).map_err(host_error)?;
            self.drain_in_flight(queues, until)?;
            if !self.backend.is_durable() {
                // Complained about as it failed.
                return Err(DeviceError::NotDurable);
            }
        }
        // What was written is durable, whatever became of the queue.
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
