//! A machine that comes out of a snapshot, on a thread of its own: who brings its pages may take time over it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use super::{ApiServer, Event, Supervisor, SupervisorError};
use crate::footprint::give_back_text;
use crate::machine::{Machine, MachineError};
use crate::output;

/// The job, and what is to be said when it is done.
pub(super) struct RestoreJob {
    thread: JoinHandle<()>,
    /// Whether it may have to wait for pages, for ever.
    may_hang: bool,
    announcement: String,
}

impl RestoreJob {
    /// Waits for its end, unless that may never come: then it ends with the process.
    pub(super) fn end(self) {
        if !self.may_hang {
            // A panic in it has been reported by the panic hook.
            let _ = self.thread.join();
        }
    }
}

impl Supervisor {
    /// Lets `restore` make the machine. `announcement` is a line for stderr that tells of it, `may_hang` whether its
    /// memory comes from somebody who may keep it waiting.
    pub fn restore(
        &mut self,
        restore: impl FnOnce() -> Result<Machine, MachineError> + Send + 'static,
        may_hang: bool,
        announcement: String,
    ) -> io::Result<()> {
        let supervisor = self.handle.clone();
        let thread = std::thread::Builder::new()
            .name("restore".into())
            .spawn(move || {
                let restored = catch_unwind(AssertUnwindSafe(restore)).map_or_else(
                    |_| Err("the restoring job panicked".into()),
                    |restored| restored.map_err(|error| migration::chain(&error)),
                );
                supervisor.send(Event::Restored(restored.map(Box::new)));
            })?;
        self.restore = Some(RestoreJob {
            thread,
            may_hang,
            announcement,
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
                // Scripts wait for this line.
                output::tell(&job.announcement);
                give_back_text();
                None
            }
            Err(reason) => Some(SupervisorError::Restore(reason)),
        }
    }
}
