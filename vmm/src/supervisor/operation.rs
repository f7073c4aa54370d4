//! Operations that may take seconds, each on a thread of its own: a vCPU may be slow to leave the guest, and a disk
//! image slow to be measured. The supervisor handles other requests meanwhile, and puts off those that would conflict.

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

/// An operation under way, and the reply to the request that started it.
pub(super) struct Operation {
    job: Job,
    reply: Reply<()>,
    kind: OperationKind,
}

/// What an operation does, as far as the state that the API shows depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OperationKind {
    /// It takes the vCPUs out of a guest that runs.
    Pause,
    /// Anything else.
    Other,
}

impl Operation {
    /// Whether it is a pause whose vCPUs are not all out of the guest yet.
    pub(super) fn is_pause(&self) -> bool {
        self.kind == OperationKind::Pause
    }
}

impl Supervisor {
    /// Takes the vCPUs out of the guest for the user; `reply` is answered when the last one is out.
    pub(super) fn pause(&mut self, reply: Reply<()>) {
        let pause = |machine: &Machine| machine.pause_for_user().map_err(failed);
        let machine = self.idle_machine().cloned();
        let kind = match &machine {
            Ok(machine) if !machine.is_held_by(Holder::User) => OperationKind::Pause,
            _ => OperationKind::Other,
        };
        self.operate(machine, kind, pause, reply);
    }

    /// Lets the guest run on after a user's pause, or after a migration that could not give it back.
    pub(super) fn resume(&mut self, reply: Reply<()>) {
        let resume = |machine: &Machine| {
            if machine.is_held_by(Holder::Migration) {
                // A failed migration may have left the guest paused: another process held the locks of its disks.
                machine.resume_after_migration().map_err(failed)?;
            }
            machine.resume_for_user();
            Ok(())
        };
        self.operate(self.idle_machine().cloned(), OperationKind::Other, resume, reply);
    }

    /// Reads a disk's size anew and changes its limits. A migration has described both to the destination, so this
    /// needs an idle machine.
    pub(super) fn update_disk(&mut self, update: Box<DriveUpdate>, reply: Reply<()>) {
        let machine = self.idle_machine().cloned();
        let update = move |machine: &Machine| apply_update(machine, &update);
        self.operate(machine, OperationKind::Other, update, reply);
    }

    /// Runs `act` with the machine on a thread of its own; `reply` is answered when it has ended.
    fn operate(
        &mut self,
        machine: Result<Arc<Machine>, Refusal>,
        kind: OperationKind,
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
            // The supervisor must be the machine's last owner when it handles the event.
            drop(machine);
            supervisor.send(Event::OperationEnded(ended));
        };
        let job =
            Control::new().and_then(|control| Job::start(Role::Operation, "operate", Arc::new(control), run));
        match job {
            Ok(job) => {
                self.operation = Some(Operation { job, reply, kind });
            }
            Err(error) => answer(reply, Err(failed(error))),
        }
    }

    /// Answers the request that started the operation, then handles the requests that were put off.
    pub(super) fn operation_ended(&mut self, ended: Result<(), Refusal>) {
        if let Some(Operation { reply, .. }) = self.operation.take() {
            answer(reply, ended);
        }
        self.stop_second_copy();
        while self.operation.is_none()
            && let Some(request) = self.deferred.pop_front()
        {
            // A client that gave up waiting got the answer that nothing has happened, which must stay true.
            if !request.is_abandoned() {
                self.handle_request(request);
            }
        }
    }

    /// Puts off a request that would conflict with the operation under way; returns any other. The limit of the API's
    /// connections bounds how many are put off.
    pub(super) fn defer(&mut self, request: Request) -> Option<Request> {
        let conflicts = matches!(
            request,
            Request::Pause(_)
                | Request::Resume(_)
                | Request::UpdateDisk(..)
                | Request::Migrate { .. }
                | Request::Snapshot(..)
        );
        if self.operation.is_none() || !conflicts {
            return Some(request);
        }
        self.deferred.push_back(request);
        None
    }

    /// Waits for the operation under way, if there is one. One that may hang for ever ends with the process instead.
    pub(super) fn settle_operation(&mut self, may_hang: bool) {
        if let Some(operation) = self.operation.take()
            && !may_hang
        {
            operation.job.end();
        }
    }
}

/// Changes a disk as a client asks, after a check of all that it asks for.
fn apply_update(machine: &Machine, update: &DriveUpdate) -> Result<(), Refusal> {
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
    disk.refresh_size().map_err(failed)?;
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

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::console::Console;

    #[test]
    fn requests_that_would_conflict_wait_for_the_operation_and_others_do_not() {
        let mut supervisor = Supervisor::new("web", Console::detached());
        let control = Arc::new(Control::new().unwrap());
        let (pause, mut paused) = oneshot::channel();
        supervisor.operation = Some(Operation {
            job: Job::start(Role::Operation, "operate", control, || {}).unwrap(),
            reply: pause,
            kind: OperationKind::Pause,
        });
        let (resume, mut resumed) = oneshot::channel();
        let (info, mut shown) = oneshot::channel();
        supervisor.handle_request(Request::Resume(resume));
        supervisor.handle_request(Request::Info(info));
        assert!(shown.try_recv().unwrap().is_ok());
        assert!(resumed.try_recv().is_err(), "answered during the pause");
        supervisor.operation_ended(Ok(()));
        assert!(paused.try_recv().unwrap().is_ok());
        let refused = resumed.try_recv().unwrap();
        assert!(matches!(refused, Err(Refusal::NoMachine)), "{refused:?}");
    }
}
