//! Makes a machine from a snapshot, or boots one again, on a thread of its own: the fault handler that brings its pages
//! may take its time, or never answer, and the supervisor must not wait for it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;

use threads::Role;

use super::{ApiServer, Event, Supervisor, SupervisorError, Worker};
use crate::footprint::release_text;
use crate::machine::{Machine, MachineError};

/// The job, and what follows once it has made the machine.
pub(super) struct RestoreJob {
    worker: Worker,
    /// Whether the job may wait for pages for ever.
    may_hang: bool,
    /// Cancels the job when it is dropped, as long as the job waits.
    called_off: Option<mpsc::Sender<()>>,
    announce: Box<dyn FnOnce()>,
}

impl RestoreJob {
    /// Waits for the job's end. A job that may hang for ever ends with the process instead.
    pub(super) fn end(self) {
        drop(self.called_off);
        if !self.may_hang {
            self.worker.join();
        }
    }
}

impl Supervisor {
    /// Has `restore` make the machine, then calls `announce`. `may_hang` says whether its memory comes from a fault
    /// handler, for which the thread may wait for ever.
    pub fn restore(
        &mut self,
        restore: impl FnOnce() -> Result<Machine, MachineError> + Send + 'static,
        may_hang: bool,
        announce: impl FnOnce() + 'static,
    ) -> io::Result<()> {
        self.make_machine(restore, may_hang, None, announce)
    }

    pub(super) fn make_machine(
        &mut self,
        make: impl FnOnce() -> Result<Machine, MachineError> + Send + 'static,
        may_hang: bool,
        called_off: Option<mpsc::Sender<()>>,
        announce: impl FnOnce() + 'static,
    ) -> io::Result<()> {
        let supervisor = self.handle.clone();
        let worker = Worker::start(Role::Restore, "restore", move || {
            let made = catch_unwind(AssertUnwindSafe(make)).map_or_else(
                |_| Err("the restoring job panicked".into()),
                |made| made.map_err(|error| migration::chain(&error)),
            );
            supervisor.send(Event::Restored(made.map(Box::new)));
        })?;
        self.restore = Some(RestoreJob {
            worker,
            may_hang,
            called_off,
            announce: Box::new(announce),
        });
        Ok(())
    }

    pub(super) fn restored(
        &mut self,
        restored: Result<Box<Machine>, String>,
        server: &ApiServer,
    ) -> Option<SupervisorError> {
        let job = self.restore.take()?;
        match restored {
            Ok(machine) => {
                self.adopt(*machine, server);
                self.stop_second_copy();
                self.booted();
                (job.announce)();
                release_text();
                None
            }
            Err(reason) => Some(SupervisorError::Restore(reason)),
        }
    }
}
