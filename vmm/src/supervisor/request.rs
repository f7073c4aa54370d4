//! The requests and events that the supervisor handles, its answers, and the handle to send them. Nothing here acts on
//! the machine.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use api::{DriveUpdate, InstanceInfo, Metrics, Resolution, SnapshotReport, SnapshotRequest};
use devices::virtio::balloon;
use migration::{Answer, AskError, Decision, Doubt, MigrateOptions, Migrated, Progress, Receiver, Report};
use thiserror::Error;
use threads::Failure;
use tokio::sync::{broadcast, oneshot};

use crate::machine::{Machine, MachineEvent, MigrationSource};

/// Why a request was refused.
#[derive(Clone, Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum Refusal {
    #[error(
        "a migration is under way: expected none; `godwit status` shows it, `godwit cancel` calls it off"
    )]
    Migrating,
    #[error("a snapshot is being written: expected none; `godwit status` shows how far it is")]
    Snapshotting,
    #[error("the guest has been asked to shut down: expected one that goes on")]
    Stopping,
    #[error("no machine here yet: it is still being received, restored or booted again")]
    NoMachine,
    #[error("the last migration is in doubt: the guest may run at its other end, and stays paused here")]
    InDoubt,
    #[error(
        "the last migration is in doubt, and this may be the only copy of the guest: expected `godwit resolve`, which asks the other end; `godwit stop --force` throws this copy away"
    )]
    InDoubtStays,
    #[error(
        "the last migration could not give the guest back: expected one that goes on; `godwit resume` tries again"
    )]
    NotTakenBack,
    #[error("no migration is under way")]
    NoMigration,
    #[error("nothing is in doubt here: the guest is this process's own")]
    NoDoubt,
    #[error("it is being resolved already")]
    Resolving,
    #[error(
        "nothing to decide here: no machine waits for a source that fell silent; `godwit resolve` at the source asks this side"
    )]
    NothingToDecide,
    #[error("this machine has no balloon: start it with `run --balloon`")]
    NoBalloon,
    #[error("this machine has no disk {0:?}")]
    NoDisk(String),
    #[error("{0}")]
    Failed(String),
    #[error("the VM has just ended")]
    Gone,
}

/// The answer to a request.
pub(super) type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// A request to the supervisor, with the channel for its answer.
pub enum Request {
    /// What and how is this VM?
    Info(Reply<InstanceInfo>),
    /// Hold the vCPUs out of the guest.
    Pause(Reply<()>),
    /// Let them in again.
    Resume(Reply<()>),
    /// Ask the guest to shut down.
    PowerButton(Reply<()>),
    /// End.
    Stop {
        /// Even if that throws away what may be the only copy of a guest.
        force: bool,
        /// Answered before the end.
        reply: Reply<()>,
    },
    /// Move to `destination`; the answer is a feed that ends with the report.
    Migrate {
        /// Where to.
        destination: migration::Endpoint,
        /// How.
        options: Box<MigrateOptions>,
        /// Answered when the job has started.
        reply: Reply<MigrationFeed>,
    },
    /// Put the machine in files; the answer comes when that has ended.
    Snapshot(SnapshotRequest, Reply<SnapshotReport>),
    /// What the machine's devices have counted.
    Metrics(Reply<Metrics>),
    /// The host's end of the machine's balloon.
    Balloon(Reply<Arc<balloon::BalloonControl>>),
    /// Ask the guest to give up this many bytes.
    SetBalloon(u64, Reply<()>),
    /// Read a disk's size anew, and change its limits.
    UpdateDisk(Box<DriveUpdate>, Reply<()>),
    /// How far is the migration?
    Progress(Reply<Progress>),
    /// End the migration, or the snapshot; the guest runs on here.
    Cancel(Reply<()>),
    /// Find out what became of a migration in doubt, or decide.
    Resolve(Option<Decision>, Reply<Resolution>),
}

impl Request {
    /// Whether the client no longer waits for the answer. Only for requests that may be put off during an operation.
    pub(super) fn is_abandoned(&self) -> bool {
        match self {
            Self::Pause(reply) | Self::Resume(reply) | Self::UpdateDisk(_, reply) => reply.is_closed(),
            Self::Migrate { reply, .. } => reply.is_closed(),
            Self::Snapshot(_, reply) => reply.is_closed(),
            _ => false,
        }
    }
}

/// A migration job as its clients see it.
pub struct MigrationFeed {
    /// Where it is.
    pub control: Arc<migration::Control>,
    /// Delivers the report when it has ended.
    pub report: broadcast::Receiver<Report>,
}

/// What the supervisor waits for.
pub(crate) enum Event {
    /// From the API.
    Request(Request),
    /// From a machine.
    Machine {
        /// The machine's number, counted over all that this process has had.
        number: u64,
        /// What has happened.
        event: MachineEvent,
    },
    /// The user at the terminal typed the escape key.
    Escape,
    /// SIGTERM, SIGINT or SIGHUP.
    Terminate,
    /// The migration job has ended.
    MigrationEnded(Box<EndedMigration>),
    /// The operation under way has ended.
    OperationEnded(Result<(), Refusal>),
    /// The snapshot job has ended.
    SnapshotEnded(Result<SnapshotReport, String>),
    /// The destination's answer about a migration in doubt, or why there is none.
    Answered(Result<Answer, AskError>),
    /// A machine in doubt was resumed here, or why it was not.
    TakenBack(Box<MigrationSource>, Result<(), String>),
    /// The answer of a destination that may have been ready when the guest was resumed here; `None` if it did not
    /// answer.
    Withdrawn(Doubt, Option<Answer>),
    /// The receiving job has no machine after all, and waits for the next.
    AttemptFailed(String),
    /// The receiving job has a machine.
    Received(Box<ArrivedMachine>),
    /// The receiving job cannot go on.
    ReceiveFailed(String),
    /// The machine of a snapshot is there, or cannot be had.
    Restored(Result<Box<Machine>, String>),
    /// A thread has failed.
    ThreadFailed(Failure),
    /// The fault handler, which brings the pages of guest memory, has ended.
    FaultHandlerGone,
    /// Memory of the machine's snapshot cannot be read, for this reason.
    PagesMissing(String),
}

/// A migration away that has ended.
pub(crate) struct EndedMigration {
    pub(crate) migrated: Migrated,
    /// The machine as the migration left it, if the outcome is in doubt.
    pub(crate) source: Option<Box<MigrationSource>>,
}

/// A machine that came after "go".
pub(crate) struct ArrivedMachine {
    pub(crate) machine: Machine,
    /// Why it is paused, if it does not run.
    pub(crate) reason: Option<String>,
    /// The receiver, kept if the source may still ask for the outcome.
    pub(crate) receiver: Option<Receiver>,
}

/// Sends events to the supervisor, from any thread.
#[derive(Clone)]
pub struct SupervisorHandle {
    events: mpsc::Sender<Event>,
}

impl SupervisorHandle {
    pub(crate) fn new(events: mpsc::Sender<Event>) -> Self {
        Self { events }
    }

    /// Sends an event. Without a supervisor it is dropped: the process is about to end.
    pub(crate) fn send(&self, event: Event) {
        if self.events.send(event).is_err() {
            tracing::debug!("an event came after the end");
        }
    }

    /// Reports that the user typed the key that ends a VM in the foreground.
    pub fn escape(&self) {
        self.send(Event::Escape);
    }

    /// Reports that a thread of this process panicked, or ended although it must not.
    pub fn thread_failed(&self, failure: Failure) {
        self.send(Event::ThreadFailed(failure));
    }

    /// Reports that the fault handler's process has ended.
    pub fn fault_handler_gone(&self) {
        self.send(Event::FaultHandlerGone);
    }

    /// Ends the VM: what is left of its memory cannot be read from its snapshot, for this reason.
    pub fn pages_missing(&self, reason: String) {
        self.send(Event::PagesMissing(reason));
    }

    /// Sends a request and waits for the answer.
    pub async fn request<T>(&self, new_request: impl FnOnce(Reply<T>) -> Request) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.send(Event::Request(new_request(reply)));
        answer.await.unwrap_or(Err(Refusal::Gone))
    }
}

/// As long as a wait without a deadline may be.
pub(crate) const NEVER: Duration = Duration::from_secs(u32::MAX as u64);
