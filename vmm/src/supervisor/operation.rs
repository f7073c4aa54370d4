//! What takes its time with the machine, on a thread of its own: a vCPU may take seconds to leave the guest, and so may
//! an image to be measured. The supervisor answers everybody else meanwhile.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use api::DriveUpdate;
use migration::Control;
use threads::Role;

use super::request::Reply;
use super::{Event, Job, Refusal, Request, Supervisor, answer, failed};
use crate::config::{ConfigError, updated_limits};
use crate::machine::Machine;
use crate::vcpu::Holder;

/// An operation under way, and who waits for it.
pub(super) struct Operation {
    job: Job,
    reply: Reply<()>,
    /// Whether the vCPUs are held for it that are not all out yet.
    pub(super) pauses: bool,
}

impl Supervisor {
    pub(super) fn pause(&mut self, reply: Reply<()>) {
        let pause = |machine: &Machine| machine.pause_for_user().map_err(failed);
        let machine = self.idle_machine().cloned();
        let pauses = machine
            .as_ref()
            .is_ok_and(|machine| !machine.is_held_by(Holder::User));
        self.operate(machine, pauses, pause, reply);
    }

    pub(super) fn resume(&mut self, reply: Reply<()>) {
        let resume = |machine: &Machine| {
            if machine.is_held_by(Holder::Migration) {
                // One that failed could not give the guest back: somebody had its disks.
                machine.resume_after_migration().map_err(failed)?;
            }
            machine.resume_for_user();
            Ok(())
        };
        self.operate(self.idle_machine().cloned(), false, resume, reply);
    }

    /// Looks at a disk's size anew and changes its limits. Size and limits are part of what a destination was told.
    pub(super) fn update_disk(&mut self, update: Box<DriveUpdate>, reply: Reply<()>) {
        let machine = self.idle_machine().cloned();
        self.operate(machine, false, move |machine| change(machine, &update), reply);
    }

    /// Has `act` done with the machine; `reply` is answered when it has ended.
    fn operate(
        &mut self,
        machine: Result<Arc<Machine>, Refusal>,
        pauses: bool,
        act: impl FnOnce(&Machine) -> Result<(), Refusal> + Send + 'static,
        reply: Reply<()>,
    ) {
        let machine = match machine {
            Ok(machine) => machine,
            Err(refusal) => return answer(reply, Err(refusal)),
        };
        let supervisor = self.handle.clone();
        let run = move || {
            let panicked = |_| Err(Refusal::Failed("the operation panicked, see the log".into()));
            let ended = catch_unwind(AssertUnwindSafe(|| act(&machine))).unwrap_or_else(panicked);
            // The supervisor must be the last owner of the machine when it hears of the end.
            drop(machine);
            supervisor.send(Event::OperationEnded(ended));
        };
        let job =
            Control::new().and_then(|control| Job::start(Role::Operation, "operate", Arc::new(control), run));
        match job {
            Ok(job) => {
                self.operation = Some(Operation { job, reply, pauses });
            }
            Err(error) => answer(reply, Err(failed(error))),
        }
    }

    /// Answers whoever waited, then does what was asked for meanwhile.
    pub(super) fn operation_ended(&mut self, ended: Result<(), Refusal>) {
        if let Some(Operation { reply, .. }) = self.operation.take() {
            answer(reply, ended);
        }
        self.stop_second_copy();
        while self.operation.is_none()
            && let Some(request) = self.deferred.pop_front()
        {
            // Whoever has given up was told that nothing had happened.
            if !request.is_abandoned() {
                self.handle_request(request);
            }
        }
    }

    /// Puts a request off that would meet the operation under way. The API's connections bound how many there are.
    pub(super) fn defer(&mut self, request: Request) -> Option<Request> {
        let meets = matches!(
            request,
            Request::Pause(_)
                | Request::Resume(_)
                | Request::UpdateDisk(..)
                | Request::Migrate { .. }
                | Request::Snapshot(..)
        );
        if self.operation.is_none() || !meets {
            return Some(request);
        }
        self.deferred.push_back(request);
        None
    }

    /// Waits for the operation under way, if there is one, unless that may never end: then it ends with the process.
    pub(super) fn settle_operation(&mut self, may_hang: bool) {
        if let Some(operation) = self.operation.take()
            && !may_hang
        {
            operation.job.end();
        }
    }
}

fn change(machine: &Machine, update: &DriveUpdate) -> Result<(), Refusal> {
    let id = &update.drive_id;
    let disk = machine.disk(id).ok_or_else(|| Refusal::NoDisk(id.clone()))?;
    let before = disk.limits();
    let limits = update
        .rate_limiter
        .map_or(before, |limiter| updated_limits(limiter, before));
    limits.check().map_err(|source| {
        let id = id.clone();
        failed(ConfigError::Limits { id, source })
    })?;
    check_path(update, disk.path())?;
    disk.resize().map_err(failed)?;
    if limits != before {
        disk.set_limits(limits);
    }
    Ok(())
}

/// Refuses another file than the disk's own.
fn check_path(update: &DriveUpdate, path: &Path) -> Result<(), Refusal> {
    match &update.path_on_host {
        Some(other) if other != path => Err(Refusal::Failed(format!(
            "disk {:?}: expected its own path_on_host, {path:?}, got {other:?}",
            update.drive_id
        ))),
        _ => Ok(()),
    }
}
