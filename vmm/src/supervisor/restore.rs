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
    wait: RestoreWait,
    /// Cancels the job when it is dropped, as long as the job waits.
    called_off: Option<mpsc::Sender<()>>,
    announce: Box<dyn FnOnce()>,
}

/// How long a job that makes a machine may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreWait {
    /// It ends.
    Bounded,
    /// It may wait for ever: the machine's pages come when they are needed, from a fault handler or a file.
    Endless,
}

impl RestoreJob {
    /// Waits for the job's end. A job that may hang for ever ends with the process instead.
    pub(super) fn end(self) {
        drop(self.called_off);
        if self.wait == RestoreWait::Bounded {
            self.worker.join();
        }
    }
}

impl Supervisor {
    /// Has `restore` make the machine on a thread of its own, then calls `announce`.
    pub fn restore(
        &mut self,
        restore: impl FnOnce() -> Result<Machine, MachineError> + Send + 'static,
        wait: RestoreWait,
        announce: impl FnOnce() + 'static,
    ) -> io::Result<()> {
        self.make_machine(restore, wait, None, announce)
    }

    /// Has `make` make the machine on a thread of its own, then calls `announce`. `called_off` is dropped if the VM ends
    /// before that.
    pub(super) fn make_machine(
        &mut self,
        make: impl FnOnce() -> Result<Machine, MachineError> + Send + 'static,
        wait: RestoreWait,
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
            wait,
            called_off,
            announce: Box::new(announce),
        });
        Ok(())
    }

    /// Takes over the machine that was made. Without one the VM ends.
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
