//! A machine that comes out of a snapshot, or boots again, on a thread of its own: who brings its pages may take time over
//! it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;

use threads::Role;

use super::{ApiServer, Event, Supervisor, SupervisorError, Worker};
use crate::footprint::release_text;
use crate::machine::{Machine, MachineError};

/// The job, and what is to be done when it has made its machine.
pub(super) struct RestoreJob {
    worker: Worker,
    /// Whether it may have to wait for pages, for ever.
    may_hang: bool,
    /// What calls it off when it is dropped, as long as the job waits for something.
    called_off: Option<mpsc::Sender<()>>,
    announce: Box<dyn FnOnce()>,
}

impl RestoreJob {
    /// Waits for its end, unless that may never come: then it ends with the process.
    pub(super) fn end(self) {
        drop(self.called_off);
        if !self.may_hang {
            self.worker.join();
        }
    }
}

impl Supervisor {
    /// Lets `restore` make the machine. `announce` tells of it, `may_hang` is whether its memory comes from somebody who
    /// may keep it waiting.
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
