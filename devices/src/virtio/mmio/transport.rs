//! The registers of a virtio device, and its life cycle for the machine.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use migration_state::{Envelope, StateError};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::error::MmioTransportError;
use super::registers as reg;
use super::shared::{TransportShared, TransportWorker};
use super::state::{LayoutError, MmioTransportState, QueueRecord};
use crate::GuestMemory;
use crate::metrics::Counters;
use crate::virtio::{Description, DeviceError, HostBackend, Interrupt, VirtioDevice};
use crate::wake_event::WakeEvent;

/// A virtio device on an MMIO bus, to be mapped for [`super::LEN`] bytes.
pub struct MmioTransport {
    pub(super) shared: Arc<TransportShared>,
    backend: Option<Arc<dyn HostBackend>>,
    metrics: Arc<dyn Counters>,
    pub(super) device_type: u32,
    pub(super) offered: u64,
    pub(super) driver_features: u64,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) queue_select: u32,
    /// The queues' registers as the driver wrote them; the positions of live queues are in [`TransportShared`].
    pub(super) queues: Vec<QueueRecord>,
}

/// How long a vCPU waits in a reset for work in flight. After that the device thread waits for it.
const RESET_TIME: Duration = Duration::from_millis(500);

impl MmioTransport {
    /// Puts `device` behind registers. The device's buffers are in `memory`; it interrupts through `line`.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        line: EventFd,
    ) -> Result<Self, MmioTransportError> {
        let device_type = device.device_type();
        let queues: Vec<_> = device
            .queue_sizes()
            .iter()
            .map(|&size| QueueRecord::new(size))
            .collect();
        let events: Result<Vec<_>, _> = queues.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect();
        let event_error = |source| MmioTransportError::Event {
            device: device_type,
            source,
        };
        let events = events.map_err(event_error)?;
        let host_event = WakeEvent::new().map_err(event_error)?;
        Ok(Self {
            backend: device.host_backend(),
            metrics: device.metrics(),
            device_type,
            offered: device.features() | reg::VERSION_1,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues,
            shared: Arc::new(TransportShared::new(
                device,
                memory,
                Interrupt::new(line),
                events,
                host_event,
            )),
        })
    }

    /// The half that serves the queues on the device thread.
    pub fn worker(&self) -> TransportWorker {
        TransportWorker(self.shared.clone())
    }

    /// The device ID (virtio 1.2, 5).
    pub fn device_type(&self) -> u32 {
        self.device_type
    }

    /// An eventfd for each queue. The machine raises it when the guest writes the queue's index, as 32 bits,
    /// to [`MmioTransport::NOTIFY_OFFSET`].
    pub fn queue_events(&self) -> &[EventFd] {
        &self.shared.queue_events
    }

    /// Offset of the QueueNotify register.
    pub const NOTIFY_OFFSET: u64 = reg::QUEUE_NOTIFY;

    /// Stops serving queues. After this call no chain is popped; [`MmioTransport::drain`] finishes the requests in
    /// flight.
    pub fn pause(&self) {
        self.shared.core().paused = true;
    }

    /// Serves queues again. Every queue and the host side are served once, in case an event was lost during the pause
    /// or the move, and an interrupt that the guest has not acknowledged is raised again.
    pub fn resume(&self) {
        self.shared.core().paused = false;
        self.shared.interrupt.raise_again();
        for index in 0..self.queues.len() {
            self.shared.kick(index);
        }
        self.shared.raise_host_event();
    }

    /// Finishes work in flight and makes every write that was answered durable. Comes after [`MmioTransport::pause`];
    /// once it has returned the device does not touch guest memory. Fails if that takes longer than `until`;
    /// [`MmioTransport::resume`] then lets the device go on.
    pub fn drain(&self, until: Instant) -> Result<(), MmioTransportError> {
        self.shared
            .drain(until)
            .map_err(|source| self.device_error(source))
    }

    /// What a destination must know of the device to build a matching one.
    pub fn describe(&self) -> Description {
        self.shared.core().device.describe()
    }

    /// The counters of the transport and of its device.
    pub fn metrics(&self) -> [Arc<dyn Counters>; 2] {
        [self.shared.clone(), self.metrics.clone()]
    }

    /// The device's backend on the host. Its calls may take as long as a disk does: the caller must not hold a lock
    /// that a guest's access needs, such as the transport's own.
    pub fn host_backend(&self) -> Option<Arc<dyn HostBackend>> {
        self.backend.clone()
    }

    /// Adds the saved state of transport and device to `envelope`. After [`MmioTransport::pause`].
    pub fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), MmioTransportError> {
        let core = self.shared.core();
        if !core.paused {
            return Err(MmioTransportError::NotPaused {
                device: self.device_type,
            });
        }
        let live = |index: usize| core.queues.get(index).and_then(Option::as_ref);
        let record =
            |(index, queue): (usize, &QueueRecord)| live(index).map_or(*queue, |live| queue.at(live));
        let state = MmioTransportState {
            device_type: self.device_type,
            status: self.shared.status(),
            driver_features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            interrupt_status: self.shared.interrupt.status(),
            config_generation: self.shared.interrupt.config_generation(),
            queues: self.queues.iter().enumerate().map(record).collect(),
        };
        envelope
            .put(instance, &state)
            .map_err(|source| self.state_error(source))?;
        core.device
            .save(envelope, instance)
            .map_err(|source| self.device_error(source))
    }

    /// Takes the saved state of transport and device out of `envelope`. Afterwards the transport is paused;
    /// after an error it is as after a reset, and paused.
    pub fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), MmioTransportError> {
        self.reset();
        self.pause();
        let restored = self.try_restore(envelope, instance);
        if restored.is_err() {
            self.reset();
        }
        restored
    }

    fn try_restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), MmioTransportError> {
        let state: MmioTransportState = envelope
            .take(instance)
            .map_err(|source| self.state_error(source))?;
        state.check(self.device_type, self.offered, &self.queues)?;
        let mut queues = Vec::new();
        if state.is_active() {
            for (index, queue) in state.queues.iter().enumerate() {
                let opened = queue.open(state.driver_features, &self.shared.memory);
                queues.push(opened.map_err(|error| MmioTransportError::Queue {
                    device: self.device_type,
                    index,
                    reason: describe(&error),
                })?);
            }
        }
        let mut core = self.shared.core();
        core.device
            .restore(envelope, instance)
            .map_err(|source| self.device_error(source))?;
        core.queues = queues;
        core.active = state.is_active();
        if core.active {
            core.device.activate(state.driver_features);
        }
        self.shared.status.store(state.status, Ordering::SeqCst);
        drop(core);
        self.shared.interrupt.set_status(state.interrupt_status);
        // A driver in the middle of reading the configuration reads it again, from this host's device.
        self.shared
            .interrupt
            .set_config_generation(state.config_generation.wrapping_add(1));
        self.driver_features = state.driver_features;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.queues = state.queues;
        Ok(())
    }

    /// Resets the device and the registers. The status keeps its value until the reset is over (virtio 1.2, 2.4.1), and
    /// meanwhile only another reset is accepted.
    pub(super) fn reset(&mut self) {
        if !self.shared.reset(Instant::now() + RESET_TIME) {
            tracing::warn!(
                device = self.device_type,
                "virtio: a reset waits for what is in flight"
            );
        }
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRecord::new(queue.max_size);
        }
    }

    fn state_error(&self, source: StateError) -> MmioTransportError {
        MmioTransportError::State {
            device: self.device_type,
            source,
        }
    }

    fn device_error(&self, source: DeviceError) -> MmioTransportError {
        MmioTransportError::Device {
            device: self.device_type,
            source,
        }
    }
}

fn describe(error: &LayoutError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
