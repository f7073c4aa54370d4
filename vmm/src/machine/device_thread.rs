//! The device thread: serves virtqueues and watches for the guest's exit.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::virtio::mmio::TransportWorker;
use devices::{ExitEvent, GuestExit};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use threads::{Failure, Role, Thread};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const NAME: &str = "devices";

/// A running device thread. Dropping it ends it.
pub(super) struct DeviceThread {
    end: EventFd,
    thread: Option<Thread>,
}

impl DeviceThread {
    /// Serves `workers` and calls `on_exit`, once, when `exit` is raised.
    pub(super) fn start(
        workers: Vec<TransportWorker>,
        exit: ExitEvent,
        on_exit: Box<dyn Fn(GuestExit) + Send>,
    ) -> io::Result<Self> {
        let mut manager: EventManager<Box<dyn MutEventSubscriber + Send>> =
            EventManager::new().map_err(io::Error::other)?;
        for worker in workers {
            manager.add_subscriber(Box::new(worker));
        }
        manager.add_subscriber(Box::new(ExitWatch { exit, on_exit }));
        let end = EventFd::new(EFD_NONBLOCK)?;
        let ended = Arc::new(AtomicBool::new(false));
        manager.add_subscriber(Box::new(EndWatch {
            end: end.try_clone()?,
            ended: ended.clone(),
        }));
        let thread = threads::spawn(Role::Devices, NAME, move || {
            while !ended.load(Ordering::Acquire) {
                if let Err(error) = manager.run() {
                    threads::report(Failure {
                        role: Role::Devices,
                        name: NAME.into(),
                        reason: format!("cannot wait for events: {error:?}"),
                    });
                    return;
                }
            }
        })?;
        Ok(Self {
            end,
            thread: Some(thread),
        })
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        if let Err(error) = self.end.write(1) {
            tracing::error!(%error, "device thread does not hear that it should end");
            return;
        }
        if let Some(thread) = self.thread.take() {
            // A panic in it has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

struct ExitWatch {
    exit: ExitEvent,
    on_exit: Box<dyn Fn(GuestExit) + Send>,
}

impl MutEventSubscriber for ExitWatch {
    fn process(&mut self, _: Events, ops: &mut EventOps) {
        if let Some(reason) = self.exit.reason() {
            (self.on_exit)(reason);
        }
        // The event stays readable; once is enough.
        watch_error(ops.remove(Events::new(self.exit.event(), EventSet::IN)));
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch_error(ops.add(Events::new(self.exit.event(), EventSet::IN)));
    }
}

struct EndWatch {
    end: EventFd,
    ended: Arc<AtomicBool>,
}

impl MutEventSubscriber for EndWatch {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.ended.store(true, Ordering::Release);
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch_error(ops.add(Events::new(&self.end, EventSet::IN)));
    }
}

fn watch_error(result: Result<(), event_manager::Error>) {
    if let Err(error) = result {
        tracing::error!(?error, "device thread cannot watch an event");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{keep_failures, wait_for_failure};

    fn planted(_: GuestExit) {
        panic!("planted");
    }

    #[test]
    fn a_panic_on_the_device_thread_is_reported() {
        keep_failures();
        let exit = ExitEvent::new().unwrap();
        let thread = DeviceThread::start(Vec::new(), exit.clone(), Box::new(planted)).unwrap();
        exit.raise(GuestExit::Reset);
        assert_eq!(wait_for_failure(Role::Devices).reason, "panicked: planted");
        drop(thread);
    }
}
