//! What the registers and the device thread share: the device, its live queues, its interrupt.
//!
//! Lock order: the transport's own lock (the bus holds it) before [`Shared::core`].

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::registers::{DRIVER_OK, NEEDS_RESET};
use crate::GuestMemory;
use crate::limited::Limited;
use crate::virtio::{Interrupt, Progress, QueueAccess, QueueError, VirtioDevice};

pub(super) struct Shared {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    /// The device status. Bits are added by either half; only a reset, under the core's lock, takes them away.
    pub(super) status: AtomicU8,
    /// One eventfd for each queue, readable after a kick.
    pub(super) queue_events: Vec<EventFd>,
    pub(super) complaints: Limited,
    core: Mutex<Core>,
}

/// The device and the queues that it serves.
pub(super) struct Core {
    pub(super) device: Box<dyn VirtioDevice>,
    /// By index; `None` for a queue that the driver does not use. Empty before DRIVER_OK.
    pub(super) queues: Vec<Option<Queue>>,
    /// The driver is ready, and nothing broke since.
    pub(super) active: bool,
    /// No queue is served until somebody resumes.
    pub(super) paused: bool,
}

impl Shared {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        interrupt: Interrupt,
        queue_events: Vec<EventFd>,
    ) -> Self {
        let core = Core {
            device,
            queues: Vec::new(),
            active: false,
            paused: false,
        };
        Self {
            memory,
            interrupt,
            status: AtomicU8::new(0),
            queue_events,
            complaints: Limited::default(),
            core: Mutex::new(core),
        }
    }

    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// Makes the device thread look at a queue.
    pub(super) fn kick(&self, index: usize) {
        if let Some(event) = self.queue_events.get(index)
            && let Err(error) = event.write(1)
        {
            // The counter is full: the thread will look anyway.
            tracing::debug!(%error, index, "kick not counted");
        }
    }

    /// The device cannot go on without a reset by the driver (virtio 1.2, 2.1.2).
    pub(super) fn needs_reset(&self, core: &mut Core, why: &(dyn std::error::Error + 'static)) {
        core.active = false;
        let before = self.status.fetch_or(NEEDS_RESET, Ordering::SeqCst);
        if before & DRIVER_OK != 0 {
            self.interrupt.config_change();
        }
        if let Some(count) = self.complaints.count() {
            let device = core.device.device_type();
            let cause = why.source().map(ToString::to_string).unwrap_or_default();
            tracing::warn!(device, count, cause, "virtio device needs a reset: {why}");
        }
    }

    fn serve(&self, index: usize) {
        let mut core = self.core();
        if let Some(event) = self.queue_events.get(index) {
            // Nothing to read is fine: somebody else took the kick. A paused queue is kicked again by resume.
            let _ = event.read();
        }
        match core.serve(index, &self.memory, &self.interrupt) {
            Ok(Progress::Idle) => {}
            Ok(Progress::More) => self.kick(index),
            Err(error) => self.needs_reset(&mut core, &error),
        }
    }
}

impl Core {
    fn serve(
        &mut self,
        index: usize,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<Progress, QueueError> {
        if self.paused || !self.active {
            return Ok(Progress::Idle);
        }
        match self.queues.get_mut(index) {
            Some(Some(queue)) => self.device.process_queue(
                index,
                &mut QueueAccess {
                    memory,
                    queue,
                    interrupt,
                },
            ),
            _ => Ok(Progress::Idle),
        }
    }
}

/// The half of a transport that serves its queues; belongs on the device thread's event manager.
#[derive(Clone)]
pub struct Worker(pub(super) Arc<Shared>);

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        self.0.serve(events.data() as usize);
    }

    fn init(&mut self, ops: &mut EventOps) {
        for (index, event) in (0..).zip(&self.0.queue_events) {
            if let Err(error) = ops.add(Events::with_data(event, index, EventSet::IN)) {
                tracing::error!(%error, index, "cannot watch a virtqueue's kicks");
            }
        }
    }
}
