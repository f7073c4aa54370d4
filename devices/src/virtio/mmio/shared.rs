//! What the registers and the device thread share: the device, its live queues, its interrupt.
//!
//! Lock order: the transport's own lock (the bus holds it) before [`TransportShared::core`].

use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::registers::{DRIVER_OK, NEEDS_RESET};
use crate::GuestMemory;
use crate::log_damper::LogDamper;
use crate::metrics::{Counter, Counters};
use crate::virtio::{DeviceError, Interrupt, QueueError, QueueProgress, Queues, VirtioDevice};
use crate::wake_event::WakeEvent;

pub(super) struct TransportShared {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    /// The device status. Both halves add bits; only a reset, under the core's lock, clears them.
    pub(super) status: AtomicU8,
    /// One eventfd for each queue, readable after a kick.
    pub(super) queue_events: Vec<EventFd>,
    /// Raised when the device must serve its host side.
    host_event: WakeEvent,
    pub(super) warnings: LogDamper,
    /// How often the device thread served a queue, for a kick or for another turn.
    served: Counter,
    pub(super) resets: Counter,
    needs_resets: Counter,
    core: Mutex<DeviceCore>,
    /// Notified when a reset is over.
    is_reset: Condvar,
}

/// The device and the queues that it serves.
pub(super) struct DeviceCore {
    pub(super) device: Box<dyn VirtioDevice>,
    /// By index; `None` for a queue that the driver does not use. Empty before DRIVER_OK.
    pub(super) queues: Vec<Option<Queue>>,
    /// The driver is ready, and the device does not need a reset.
    pub(super) active: bool,
    /// No queue is served until [`super::MmioTransport::resume`].
    pub(super) paused: bool,
    /// A reset has begun, and work in flight may still write to memory.
    resetting: bool,
}

/// The cause of a reset after a panic.
#[derive(Debug, thiserror::Error)]
#[error("it panicked")]
struct Panicked;

impl TransportShared {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        interrupt: Interrupt,
        queue_events: Vec<EventFd>,
        host_event: WakeEvent,
    ) -> Self {
        let core = DeviceCore {
            device,
            queues: Vec::new(),
            active: false,
            paused: false,
            resetting: false,
        };
        Self {
            memory,
            interrupt,
            status: AtomicU8::new(0),
            queue_events,
            host_event,
            warnings: LogDamper::default(),
            served: Counter::default(),
            resets: Counter::default(),
            needs_resets: Counter::default(),
            core: Mutex::new(core),
            is_reset: Condvar::new(),
        }
    }

    pub(super) fn core(&self) -> MutexGuard<'_, DeviceCore> {
        self.core.lock().unwrap_or_else(|poisoned| {
            // The thread that panicked may have left the device in the middle of a change.
            self.core.clear_poison();
            let mut core = poisoned.into_inner();
            self.needs_reset(&mut core, &Panicked);
            core
        })
    }

    /// Whether a reset has begun and is not over.
    pub(super) fn is_resetting(&self) -> bool {
        self.core().resetting
    }

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// Makes the device thread serve a queue.
    pub(super) fn kick(&self, index: usize) {
        if let Some(event) = self.queue_events.get(index)
            && let Err(error) = event.write(1)
        {
            // The counter is full: the device thread is on its way.
            tracing::debug!(%error, "kick not counted");
        }
    }

    /// Makes the device thread serve the device's host side.
    pub(super) fn raise_host_event(&self) {
        self.host_event.raise();
    }

    /// Stops the device until the driver resets it (virtio 1.2, 2.1.2).
    pub(super) fn needs_reset(&self, core: &mut DeviceCore, why: &(dyn std::error::Error + 'static)) {
        core.active = false;
        self.needs_resets.add(1);
        let before = self.status.fetch_or(NEEDS_RESET, Ordering::SeqCst);
        if before & DRIVER_OK != 0 {
            self.interrupt.config_change();
        }
        if let Some(count) = self.warnings.count() {
            let device = core.device.device_type();
            let cause = why.source().map(ToString::to_string).unwrap_or_default();
            tracing::warn!(device, count, cause, "virtio device needs a reset: {why}");
        }
    }

    /// Resets the device, and waits until `until` for work in flight, without holding the core's lock. Returns whether
    /// the reset is over: if not, the device thread finishes it.
    pub(super) fn reset(&self, until: Instant) -> bool {
        let mut core = self.core();
        core.queues.clear();
        core.active = false;
        core.resetting = true;
        self.wait_reset(core, until).is_some()
    }

    /// Waits for a reset that has begun; `None` if it is not over by `until`.
    fn wait_reset<'a>(
        &self,
        mut core: MutexGuard<'a, DeviceCore>,
        until: Instant,
    ) -> Option<MutexGuard<'a, DeviceCore>> {
        loop {
            self.finish_reset(&mut core);
            if !core.resetting {
                return Some(core);
            }
            if Instant::now() >= until {
                return None;
            }
            let waited = self.is_reset.wait_timeout(core, RESET_TICK);
            core = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn finish_reset(&self, core: &mut DeviceCore) {
        if core.resetting && core.device.reset() {
            core.resetting = false;
            self.status.store(0, Ordering::SeqCst);
            self.interrupt.set_status(0);
            self.is_reset.notify_all();
        }
    }

    /// Finishes the device's work in flight. A broken queue makes the device need a reset, as in a turn.
    pub(super) fn drain(&self, until: Instant) -> Result<(), DeviceError> {
        let Some(mut core) = self.wait_reset(self.core(), until) else {
            let what = "a reset of the device".into();
            return Err(DeviceError::InFlight { what });
        };
        let DeviceCore { device, queues, .. } = &mut *core;
        let queues = &mut Queues {
            memory: &self.memory,
            queues,
            interrupt: &self.interrupt,
        };
        match device.drain(queues, until) {
            Err(DeviceError::Queue(error)) => {
                self.needs_reset(&mut core, &error);
                Ok(())
            }
            done => done,
        }
    }

    fn serve(&self, source: EventSource) {
        let mut core = self.core();
        // An event that is not raised was cleared by an earlier call. A paused device is kicked again by `resume`.
        match source {
            EventSource::Queue(index) => {
                self.served.add(1);
                let _ = self.queue_events.get(index).map(EventFd::read);
            }
            EventSource::Host => {
                self.host_event.clear();
            }
        }
        if core.resetting {
            return self.finish_reset(&mut core);
        }
        // A device that panics needs a reset by the driver; the device thread and the other devices go on.
        let served = catch_unwind(AssertUnwindSafe(|| {
            core.serve(source, &self.memory, &self.interrupt)
        }));
        match served {
            Ok(Ok(QueueProgress::Idle)) => {}
            Ok(Ok(QueueProgress::More)) => match source {
                EventSource::Queue(index) => self.kick(index),
                EventSource::Host => self.raise_host_event(),
            },
            Ok(Err(error)) => self.needs_reset(&mut core, &error),
            Err(_) => self.needs_reset(&mut core, &Panicked),
        }
    }
}

impl Counters for TransportShared {
    fn read(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("queue_events", self.served.get()),
            ("interrupts", self.interrupt.raised()),
            ("resets", self.resets.get()),
            ("needs_reset", self.needs_resets.get()),
        ]
    }
}

/// How often a thread that waits for a reset tries to finish it itself.
const RESET_TICK: Duration = Duration::from_millis(1);

/// Where an event came from.
#[derive(Clone, Copy, Debug)]
enum EventSource {
    Queue(usize),
    Host,
}

impl DeviceCore {
    fn serve(
        &mut self,
        source: EventSource,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<QueueProgress, QueueError> {
        if self.paused || !self.active {
            return Ok(QueueProgress::Idle);
        }
        let queues = &mut Queues {
            memory,
            queues: &mut self.queues,
            interrupt,
        };
        match source {
            EventSource::Queue(index) => self.device.process_queue(index, queues),
            EventSource::Host => self.device.process_host(queues),
        }
    }
}

/// The half of a transport that serves its queues, a subscriber of the device thread's event manager.
#[derive(Clone)]
pub struct TransportWorker(pub(super) Arc<TransportShared>);

impl TransportWorker {
    /// All events to watch. Their data is the queue's index, or one past the last index for the host side.
    fn events(&self) -> Vec<Events> {
        let shared = &self.0;
        let host = shared.queue_events.len() as u32;
        let mut events: Vec<_> = (0..)
            .zip(&shared.queue_events)
            .map(|(index, event)| Events::with_data(event, index, EventSet::IN))
            .collect();
        events.push(Events::with_data(&shared.host_event, host, EventSet::IN));
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for descriptor in shared.core().device.host_events() {
            events.push(Events::with_data_raw(descriptor.as_raw_fd(), host, edges));
        }
        events
    }
}

impl MutEventSubscriber for TransportWorker {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let index = events.data() as usize;
        self.0.serve(if index < self.0.queue_events.len() {
            EventSource::Queue(index)
        } else {
            EventSource::Host
        });
    }

    fn init(&mut self, ops: &mut EventOps) {
        for events in self.events() {
            let data = events.data();
            if let Err(error) = ops.add(events) {
                tracing::error!(%error, data, "cannot watch a virtio device's events");
            }
        }
    }
}
