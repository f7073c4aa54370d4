//! Snapshots: saves the machine to files on a thread of its own. Whatever fails before the snapshot is complete leaves
//! the guest running.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::{SnapshotProgress, SnapshotReport, SnapshotRequest};
use threads::Role;

use super::request::Reply;
use super::{Ending, Event, Refusal, Supervisor, SupervisorError, SupervisorHandle, Worker, answer, failed};
use crate::machine::{Machine, MachineError};
use crate::snapshot::{Manifest, SnapshotDraft, SnapshotError, SnapshotId, SnapshotWatch};
use crate::vcpu::Holder;

/// The job, and the reply to the request that started it.
pub(super) struct SnapshotJob {
    worker: Worker,
    watch: Arc<SnapshotWatch>,
    keep_running: bool,
    reply: Reply<SnapshotReport>,
}

impl SnapshotJob {
    pub(super) fn progress(&self) -> SnapshotProgress {
        self.watch.progress()
    }

    /// Cancels the snapshot, after which the guest runs on; has no effect once the snapshot is complete.
    pub(super) fn cancel(&self) {
        self.watch.cancel();
    }
}

impl Supervisor {
    /// Starts a snapshot; `reply` is answered when it has ended.
    pub(super) fn snapshot(&mut self, request: SnapshotRequest, reply: Reply<SnapshotReport>) {
        let machine = match self.idle_machine() {
            Ok(_) if self.stop_at.is_some() => Err(Refusal::Stopping),
            Ok(machine) if machine.is_held_by(Holder::Migration) => Err(Refusal::NotTakenBack),
            other => other.cloned(),
        };
        let machine = match machine {
            Ok(machine) => machine,
            Err(refusal) => return answer(reply, Err(refusal)),
        };
        let watch = Arc::new(SnapshotWatch::default());
        let keep_running = request.keep_running;
        match start(machine, request, watch.clone(), self.handle.clone()) {
            Ok(worker) => {
                self.snapshot = Some(SnapshotJob {
                    worker,
                    watch,
                    keep_running,
                    reply,
                });
            }
            Err(error) => answer(reply, Err(failed(error))),
        }
    }

    /// Handles the end of a snapshot: answers the request, and ends the VM if its guest is now in the snapshot.
    pub(super) fn snapshot_ended(
        &mut self,
        ended: Result<SnapshotReport, String>,
    ) -> Option<Result<Ending, SupervisorError>> {
        let job = self.snapshot.take()?;
        let saved = ended.is_ok() && !job.keep_running;
        answer(job.reply, ended.map_err(Refusal::Failed));
        if saved {
            return Some(Ok(Ending::Saved));
        }
        if std::mem::take(&mut self.leaving) {
            return self.terminate().map(Ok);
        }
        self.reset_now()
    }

    /// Cancels the snapshot under way, if there is one, and waits for it. If that came too late, the guest is in the
    /// snapshot and does not run on.
    pub(super) fn settle_snapshot(
        &mut self,
        ending: Result<Ending, SupervisorError>,
    ) -> Result<Ending, SupervisorError> {
        let Some(job) = self.snapshot.take() else {
            return ending;
        };
        job.cancel();
        job.worker.join();
        let ended = self.events.try_iter().find_map(|event| match event {
            Event::SnapshotEnded(ended) => Some(ended),
            _ => None,
        });
        let saved = matches!(ended, Some(Ok(_))) && !job.keep_running;
        answer(
            job.reply,
            ended.map_or(Err(Refusal::Gone), |ended| ended.map_err(Refusal::Failed)),
        );
        if saved { Ok(Ending::Saved) } else { ending }
    }
}

/// Starts the thread that writes the snapshot; its end is an event to the supervisor.
fn start(
    machine: Arc<Machine>,
    request: SnapshotRequest,
    watch: Arc<SnapshotWatch>,
    supervisor: SupervisorHandle,
) -> io::Result<Worker> {
    Worker::start(Role::Snapshot, "snapshot", move || {
        let write = AssertUnwindSafe(|| write(&machine, &request, &watch));
        let ended = catch_unwind(write).map_or_else(
            |_| Err("the snapshot job panicked".into()),
            |ended| ended.map_err(|error| migration::chain(&error)),
        );
        if let Err(error) = &ended {
            tracing::warn!("no snapshot in {}: {error}", request.path.display());
        }
        // The supervisor must be the machine's last owner when it handles the event.
        drop(machine);
        supervisor.send(Event::SnapshotEnded(ended));
    })
}

/// Writes the snapshot. The guest runs on as soon as its memory was read (a live one at once), or stays paused for good once everything is
/// on the disk. A failure before that leaves it running.
fn write(
    machine: &Machine,
    request: &SnapshotRequest,
    watch: &SnapshotWatch,
) -> Result<SnapshotReport, MachineError> {
    let began = Instant::now();
    if request.diff {
        // Before any file is made, and before the guest is paused.
        machine.base()?;
    }
    if request.live {
        return write_live(machine, request, watch, began);
    }
    let mut draft = SnapshotDraft::begin(&request.path)?;
    let id = SnapshotId::random().map_err(SnapshotError::Id)?;
    let standstill = machine.stand_still()?;
    let manifest = standstill.write(&mut draft, id, request.diff, watch)?;
    let paused;
    if request.keep_running {
        let tracking = standstill.track(&manifest.id)?;
        paused = standstill.elapsed();
        drop(standstill);
        draft.publish(watch)?;
        tracking.keep();
    } else {
        draft.publish(watch)?;
        paused = standstill.elapsed();
        standstill.keep();
    }
    Ok(report(request, &manifest, watch, paused, began))
}

/// The same of a guest that runs on at once, while its memory is copied.
fn write_live(
    machine: &Machine,
    request: &SnapshotRequest,
    watch: &SnapshotWatch,
    began: Instant,
) -> Result<SnapshotReport, MachineError> {
    // All that may fail or takes its time comes before the pause.
    let copy = machine.prepare_live()?;
    let mut draft = SnapshotDraft::begin(&request.path)?;
    let id = SnapshotId::random().map_err(SnapshotError::Id)?;
    draft.create_memory(copy.memory())?;
    let standstill = machine.stand_still()?;
    let saved = standstill.protect(&copy)?;
    let mut paused = standstill.elapsed();
    let resume = || {
        paused = standstill.elapsed();
        drop(standstill);
    };
    let manifest = draft.write_live(id, saved, copy, resume, watch)?;
    draft.publish(watch)?;
    Ok(report(request, &manifest, watch, paused, began))
}

fn report(
    request: &SnapshotRequest,
    manifest: &Manifest,
    watch: &SnapshotWatch,
    paused: Duration,
    began: Instant,
) -> SnapshotReport {
    SnapshotReport {
        path: request.path.clone(),
        id: manifest.id.to_string(),
        base: manifest.base().map(ToString::to_string),
        memory_bytes: watch.progress().total_bytes,
        stored_bytes: manifest.stored_bytes(),
        paused_ms: paused.as_secs_f64() * 1e3,
        total_ms: began.elapsed().as_secs_f64() * 1e3,
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::super::Request;
    use super::*;
    use crate::console::Console;

    #[test]
    fn a_request_that_would_conflict_with_a_snapshot_is_refused() {
        let mut supervisor = Supervisor::new("web", Console::detached());
        supervisor.snapshot = Some(SnapshotJob {
            worker: Worker::start(Role::Snapshot, "snapshot", || {}).unwrap(),
            watch: Arc::default(),
            keep_running: true,
            reply: oneshot::channel().0,
        });
        let (pause, mut paused) = oneshot::channel();
        supervisor.handle_request(Request::Pause(pause));
        let refused = paused.try_recv().unwrap();
        assert!(matches!(refused, Err(Refusal::Snapshotting)), "{refused:?}");
    }
}
