//! The supervisor: the main thread and the only owner of the machine. Handles one event after another until the VM
//! ends.
//!
//! It must never wait for a guest, a peer or a disk: whatever may take its time runs on a thread of its own and comes
//! back as an [`Event`]. While a job has the machine, requests that would conflict are refused or put off.

mod jobs;
mod moves;
mod operate;
mod operation;
mod request;
mod reset;
mod resolve;
mod restore;
mod snapshot;
#[cfg(test)]
mod tests;
mod thread_failure;
mod withdraw;
mod worker;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use devices::GuestExit;
use migration::{Receiver, Report};
use thiserror::Error;
use threads::{Failure, Role};
use tokio::sync::broadcast;

use crate::console::Console;
use crate::machine::{EventSink, Machine, MachineEvent};
use crate::server::ApiServer;
use crate::vcpu::VcpuFailure;

use operate::EndConfirmation;
use operation::Operation;
pub(crate) use request::{ArrivedMachine, EndedMigration, Event};
use reset::Reboot;
use resolve::{DoubtSide, Resolving};
use restore::RestoreJob;
use snapshot::SnapshotJob;
use withdraw::Withdrawals;
use worker::{Job, Worker};

pub use request::{MigrationFeed, Refusal, Request, SupervisorHandle};
pub use reset::Boot;
pub use restore::RestoreWait;

/// How long a guest may take to shut down after the power button, unless the command line says otherwise.
pub const POWER_OFF_GRACE: Duration = Duration::from_secs(5);

/// How a VM's process ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest reset or powered itself off, or panicked.
    Guest(GuestExit),
    /// This vCPU stopped with a triple fault.
    TripleFault(u8),
    /// The user or the API's client stopped the VM.
    Stopped,
    /// The guest runs elsewhere now.
    Moved,
    /// The guest is in a snapshot now.
    Saved,
}

/// Why a VM's process ends with a failure.
#[derive(Clone, Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum SupervisorError {
    #[error(transparent)]
    Vcpu(#[from] VcpuFailure),
    #[error("{0}")]
    Receive(String),
    #[error("{0}")]
    Restore(String),
    #[error(transparent)]
    Thread(#[from] Failure),
    #[error("the page-fault handler has hung up: the guest cannot go on without the rest of its memory")]
    FaultHandlerGone,
    #[error("the guest cannot go on without the rest of its memory: {0}")]
    PagesMissing(String),
}

impl SupervisorError {
    /// Whether threads may wait for pages of guest memory that never come.
    fn leaves_pages_missing(&self) -> bool {
        match self {
            Self::FaultHandlerGone | Self::PagesMissing(_) => true,
            Self::Thread(failure) => failure.role == Role::Pages,
            _ => false,
        }
    }
}

/// Where the machine is in its life cycle.
enum Life {
    Receiving(Job),
    Here(Arc<Machine>),
    /// "go" was sent or received, and its outcome is unknown or a failure: the machine is kept, and runs only if the
    /// operator or the other side says so.
    InDoubt(Arc<Machine>, DoubtSide),
}

/// A migration of the machine to another host.
struct MigrationJob {
    job: Job,
    /// Delivers the report to the clients that wait for it.
    reports: broadcast::Sender<Report>,
}

/// The supervisor and what it needs to make one.
pub struct Supervisor {
    name: String,
    events: mpsc::Receiver<Event>,
    handle: SupervisorHandle,
    console: Console,
    life: Option<Life>,
    migration: Option<MigrationJob>,
    snapshot: Option<SnapshotJob>,
    restore: Option<RestoreJob>,
    operation: Option<Operation>,
    /// Requests that came while an operation is under way and would conflict with it.
    deferred: VecDeque<Request>,
    resolving: Option<Resolving>,
    withdrawals: Withdrawals,
    /// Answers a source that does not know that its guest runs here.
    receiver: Option<Receiver>,
    /// When the guest is stopped, if it was asked to shut down and has not done so.
    stop_at: Option<Instant>,
    /// How long a guest may take to shut down.
    stop_timeout: Duration,
    end_confirmation: EndConfirmation,
    /// The file that this process logs to.
    log: Option<PathBuf>,
    /// How the guest is booted again when it resets, if it is to be.
    reboot: Option<Reboot>,
    /// Whether the guest has reset while a job has its machine.
    resetting: bool,
    /// How many machines this process has had, the present one included.
    machines: u64,
    /// Whether the VM is to end once the job under way has ended: a machine being received or moved, or a snapshot.
    leaving: bool,
    /// Why the VM ends, if it is asked to end because a thread failed.
    failure: Option<Failure>,
}

impl Supervisor {
    /// A supervisor without a machine yet.
    pub fn new(name: &str, console: Console) -> Self {
        let (sender, events) = mpsc::channel();
        let handle = SupervisorHandle::new(sender);
        Self {
            name: name.into(),
            events,
            handle,
            console,
            life: None,
            migration: None,
            snapshot: None,
            restore: None,
            operation: None,
            deferred: VecDeque::new(),
            resolving: None,
            withdrawals: Withdrawals::default(),
            receiver: None,
            stop_at: None,
            stop_timeout: POWER_OFF_GRACE,
            end_confirmation: EndConfirmation::default(),
            log: None,
            reboot: None,
            resetting: false,
            machines: 0,
            leaving: false,
            failure: None,
        }
    }

    /// A handle with which other threads send it events.
    pub fn handle(&self) -> SupervisorHandle {
        self.handle.clone()
    }

    /// Sets how long a guest may take to shut down.
    pub fn set_stop_timeout(&mut self, timeout: Duration) {
        self.stop_timeout = timeout;
    }

    /// Sets the file that this process logs to, which the API shows.
    pub fn set_log(&mut self, log: Option<PathBuf>) {
        self.log = log;
    }

    /// Where the next machine's threads send their events. Events of machines before it no longer count.
    pub fn event_sink(&mut self) -> EventSink {
        self.machines += 1;
        let number = self.machines;
        let handle = Mutex::new(self.handle.clone());
        Arc::new(move |event| {
            let handle = handle.lock().unwrap_or_else(PoisonError::into_inner);
            handle.send(Event::Machine { number, event });
        })
    }

    /// Takes over a machine, whose guest runs from here on.
    pub fn adopt(&mut self, machine: Machine, server: &ApiServer) {
        server.console_input().connect(machine.keyboard());
        self.life = Some(Life::Here(Arc::new(machine)));
    }

    /// Serves requests until the VM ends.
    pub fn run(mut self, server: ApiServer) -> Result<Ending, SupervisorError> {
        let ending = loop {
            let next = self.stop_at.into_iter().chain(self.deciding_until()).min();
            let wait = next.map_or(request::NEVER, |at| at.saturating_duration_since(Instant::now()));
            match self.events.recv_timeout(wait) {
                Ok(event) => {
                    if let Some(ending) = self.handle_event(event, &server) {
                        break ending;
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) if self.stop_at.is_none_or(|at| at > Instant::now()) => {
                    self.refuse_decision();
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    if let Some(ending) = self.grace_over() {
                        break Ok(ending);
                    }
                }
                // `self.handle` keeps the channel open.
                Err(mpsc::RecvTimeoutError::Disconnected) => break Ok(Ending::Stopped),
            }
        };
        let may_hang = ending.as_ref().is_err_and(SupervisorError::leaves_pages_missing);
        if may_hang {
            // Jobs may wait for pages for ever. The API's clients that wait for them get the answer that the VM has
            // ended.
            (self.migration, self.snapshot) = (None, None);
        }
        let ending = self.settle_migration(ending);
        let ending = self.settle_snapshot(ending);
        self.settle_operation(may_hang);
        if !may_hang {
            self.settle_resolving();
        }
        let ending = self.settle_failure(ending);
        self.end(server);
        ending
    }

    /// Handles an event. Returns how the VM ends, if the event ends it.
    fn handle_event(&mut self, event: Event, server: &ApiServer) -> Option<Result<Ending, SupervisorError>> {
        match event {
            Event::Request(Request::Stop { force, reply }) => return self.stop(force, reply).map(Ok),
            Event::Request(Request::Resolve(decision, reply)) => {
                return self.resolve(decision, reply).map(Ok);
            }
            Event::Request(request) => self.handle_request(request),
            Event::Machine { number, event } if number == self.machines => {
                return self.handle_machine_event(event);
            }
            // An event of a machine that was replaced.
            Event::Machine { .. } => {}
            Event::Escape | Event::Terminate => return self.terminate().map(Ok),
            Event::MigrationEnded(report) => return self.migration_ended(*report),
            Event::SnapshotEnded(ended) => return self.snapshot_ended(ended),
            Event::OperationEnded(ended) => {
                self.operation_ended(ended);
                return self.reset_now();
            }
            Event::Answered(response) => return self.answered(response).map(Ok),
            Event::TakenBack(source, resumed) => self.resumed_here(source, resumed),
            Event::Withdrawn(doubt, answer) => self.withdrawn(doubt, answer),
            Event::AttemptFailed(reason) => self.attempt_ended(&reason),
            Event::Received(arrived) => return self.received(*arrived, server).map(Ok),
            Event::Restored(restored) => return self.restored(restored, server).map(Err),
            Event::ThreadFailed(failure) => return self.thread_failed(failure, server),
            Event::FaultHandlerGone => return Some(Err(SupervisorError::FaultHandlerGone)),
            Event::PagesMissing(reason) => return Some(Err(SupervisorError::PagesMissing(reason))),
            Event::ReceiveFailed(_) if self.leaving => return Some(Ok(Ending::Stopped)),
            Event::ReceiveFailed(reason) => return Some(Err(SupervisorError::Receive(reason))),
        }
        None
    }

    fn handle_machine_event(&mut self, event: MachineEvent) -> Option<Result<Ending, SupervisorError>> {
        match event {
            MachineEvent::Exit(GuestExit::Reset) => self.reset(),
            MachineEvent::Exit(reason) => Some(Ok(Ending::Guest(reason))),
            MachineEvent::VcpuFailed(VcpuFailure::TripleFault(vcpu)) => {
                // After a reset, and before its vCPUs were stopped, a guest may have caused a triple fault to reset
                // itself.
                let machine = self.machine().ok();
                if let Some(reason) = machine.and_then(|machine| machine.exit_reason()) {
                    return self.handle_machine_event(MachineEvent::Exit(reason));
                }
                // A page that the host lost may have held the guest's page tables.
                if machine.is_some_and(|machine| machine.check_memory().is_err()) {
                    return Some(Err(VcpuFailure::LostPage(vcpu).into()));
                }
                Some(Ok(Ending::TripleFault(vcpu)))
            }
            MachineEvent::VcpuFailed(failure) => Some(Err(failure.into())),
        }
    }

    /// Answers a request, starts what it asks for, or puts it off.
    fn handle_request(&mut self, request: Request) {
        let Some(request) = self.defer(request) else {
            return;
        };
        match request {
            Request::Info(reply) => answer(reply, Ok(self.info())),
            Request::Pause(reply) => self.pause(reply),
            Request::Resume(reply) => self.resume(reply),
            Request::PowerButton(reply) => answer(reply, self.press_power_button()),
            Request::Metrics(reply) => answer(reply, self.metrics()),
            Request::Balloon(reply) => answer(reply, self.balloon()),
            Request::SetBalloon(bytes, reply) => answer(reply, self.set_balloon(bytes)),
            Request::UpdateDisk(update, reply) => self.update_disk(update, reply),
            Request::Migrate {
                destination,
                options,
                reply,
            } => {
                answer(reply, self.migrate(destination, *options));
            }
            Request::Progress(reply) => {
                answer(
                    reply,
                    self.control()
                        .map(|control| control.progress())
                        .ok_or(Refusal::NoMigration),
                );
            }
            Request::Snapshot(request, reply) => self.snapshot(request, reply),
            Request::Cancel(reply) => answer(reply, self.cancel()),
            // `handle_event` has handled these: they can end the loop.
            Request::Stop { reply, .. } => answer(reply, Err(Refusal::Gone)),
            Request::Resolve(_, reply) => answer(reply, Err(Refusal::Gone)),
        }
    }

    /// Ends everything in order: jobs, machine, console, API.
    fn end(mut self, server: ApiServer) {
        match self.life.take() {
            Some(Life::Receiving(job)) => job.end(),
            // A job that hangs still uses the machine, for an unknown time.
            Some(Life::Here(machine)) if Arc::strong_count(&machine) > 1 => machine.abandon(),
            // The machine's threads may wait for pages for ever.
            Some(Life::Here(machine) | Life::InDoubt(machine, _)) if machine.may_miss_pages() => {
                machine.abandon();
            }
            other => drop(other),
        }
        if let Some(job) = self.restore.take() {
            job.end();
        }
        for event in self.events.try_iter() {
            // It has come too late, and pages that it waits for may never come.
            if let Event::Restored(Ok(machine)) = event
                && machine.may_miss_pages()
            {
                Arc::new(*machine).abandon();
            }
        }
        drop(self.receiver.take());
        self.console.flush();
        drop(server);
    }
}

/// Answers a request.
fn answer<T>(reply: request::Reply<T>, result: Result<T, Refusal>) {
    // The client may have gone; its request was carried out all the same.
    let _ = reply.send(result);
}

/// The refusal of a request that failed with this error.
fn failed(error: impl std::error::Error) -> Refusal {
    Refusal::Failed(migration::chain(&error))
}
