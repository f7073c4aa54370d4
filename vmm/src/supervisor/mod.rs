//! The supervisor: the only owner of the machine, always responsive, on the main thread.

mod jobs;
mod request;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::GuestExit;
use migration::{Control, Endpoint, MigrateOptions, Outcome, Receiver, Report};
use thiserror::Error;
use tokio::sync::broadcast;

use crate::VERSION;
use crate::api::{ApiServer, InstanceInfo, InstanceState};
use crate::console::Console;
use crate::machine::{EventSink, Machine, MachineEvent};
use crate::vcpu::{Holder, VcpuFailure};

pub(crate) use request::{Arrived, Event};
pub use request::{MigrationFeed, Refusal, Request, SupervisorHandle};

/// How long a guest may take to shut down after the power button.
pub const POWER_OFF_GRACE: Duration = Duration::from_secs(5);

/// How a VM's process ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest reset or powered itself off.
    Guest(GuestExit),
    /// Somebody stopped it.
    Stopped,
    /// The guest runs elsewhere now.
    Moved,
}

/// Why a VM's process ends with a failure.
#[derive(Clone, Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum SupervisorError {
    #[error(transparent)]
    Vcpu(#[from] VcpuFailure),
    #[error("{0}")]
    Receive(String),
}

/// Where the machine is in its life cycle.
enum Life {
    Receiving(Job),
    Here(Arc<Machine>),
    /// "go" was sent or received, and what came of it is not known or not good: kept, and never run by itself.
    InDoubt(Arc<Machine>),
}

/// A job on a thread of its own.
struct Job {
    control: Arc<Control>,
    thread: JoinHandle<()>,
}

impl Job {
    /// Cancels it and waits for its end: what it holds (a listening socket, the machine) is then gone.
    fn end(self) {
        self.control.cancel();
        // A panic in it has been reported by the panic hook.
        let _ = self.thread.join();
    }
}

struct MigrationJob {
    job: Job,
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
    /// Answers a source that does not know that its guest runs here.
    receiver: Option<Receiver>,
    stop_at: Option<Instant>,
    /// Somebody asked for the end while a machine was being received.
    leaving: bool,
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
            receiver: None,
            stop_at: None,
            leaving: false,
        }
    }

    /// A way to it, for other threads.
    pub fn handle(&self) -> SupervisorHandle {
        self.handle.clone()
    }

    /// Where a machine reports to.
    pub fn event_sink(&self) -> EventSink {
        let handle = Mutex::new(self.handle.clone());
        Arc::new(move |event| {
            let handle = handle.lock().unwrap_or_else(PoisonError::into_inner);
            handle.send(match event {
                MachineEvent::Exit(reason) => Event::GuestExit(reason),
                MachineEvent::VcpuFailed(failure) => Event::VcpuFailed(failure),
            });
        })
    }

    /// Takes a machine, which runs from here on.
    pub fn adopt(&mut self, machine: Machine, server: &ApiServer) {
        server.console_input().connect(machine.serial());
        self.life = Some(Life::Here(Arc::new(machine)));
    }

    /// Serves requests until the VM ends.
    pub fn run(mut self, server: ApiServer) -> Result<Ending, SupervisorError> {
        let ending = loop {
            let wait = self
                .stop_at
                .map_or(request::NEVER, |at| at.saturating_duration_since(Instant::now()));
            match self.events.recv_timeout(wait) {
                Ok(event) => {
                    if let Some(ending) = self.handle_event(event, &server) {
                        break ending;
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    tracing::info!("the guest did not shut down within {POWER_OFF_GRACE:?}: stopping it");
                    break Ok(Ending::Stopped);
                }
                // `self.handle` keeps the channel open.
                Err(mpsc::RecvTimeoutError::Disconnected) => break Ok(Ending::Stopped),
            }
        };
        let ending = self.settle(ending);
        self.end(server);
        ending
    }

    fn handle_event(&mut self, event: Event, server: &ApiServer) -> Option<Result<Ending, SupervisorError>> {
        match event {
            Event::Request(Request::Stop(reply)) => {
                answer(reply, Ok(()));
                return (!self.call_off()).then_some(Ok(Ending::Stopped));
            }
            Event::Request(request) => self.handle_request(request),
            Event::GuestExit(reason) => return Some(Ok(Ending::Guest(reason))),
            // A triple fault is how a guest without other means resets (`reboot=t`).
            Event::VcpuFailed(VcpuFailure::TripleFault(_)) => {
                return Some(Ok(Ending::Guest(GuestExit::Reset)));
            }
            Event::VcpuFailed(failure) => return Some(Err(failure.into())),
            Event::Escape | Event::Terminate => return self.terminate().map(Ok),
            Event::MigrationEnded(report) => return self.migration_ended(report.report).map(Ok),
            Event::Received(arrived) => return self.received(*arrived, server).map(Ok),
            Event::ReceiveFailed(_) if self.leaving => return Some(Ok(Ending::Stopped)),
            Event::ReceiveFailed(reason) => return Some(Err(SupervisorError::Receive(reason))),
        }
        None
    }

    fn received(&mut self, arrived: Arrived, server: &ApiServer) -> Option<Ending> {
        let Arrived {
            machine,
            reason,
            receiver,
        } = arrived;
        self.receiver = receiver;
        if let Some(reason) = reason {
            tracing::error!("received, but the guest stays paused: {reason}");
            self.life = Some(Life::InDoubt(Arc::new(machine)));
            return None;
        }
        tracing::info!("received: the guest runs here");
        self.adopt(machine, server);
        if self.leaving { self.terminate() } else { None }
    }

    fn handle_request(&mut self, request: Request) {
        match request {
            Request::Info(reply) => answer(reply, Ok(self.info())),
            Request::Pause(reply) => answer(reply, self.pause()),
            Request::Resume(reply) => answer(reply, self.resume()),
            Request::PowerButton(reply) => answer(reply, self.press_power_button()),
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
            Request::Cancel(reply) => answer(reply, self.cancel()),
            // Answered where the loop can end.
            Request::Stop(reply) => answer(reply, Err(Refusal::Gone)),
        }
    }

    fn machine(&self) -> Result<&Arc<Machine>, Refusal> {
        match &self.life {
            Some(Life::Here(machine)) => Ok(machine),
            Some(Life::InDoubt(_)) => Err(Refusal::InDoubt),
            Some(Life::Receiving(_)) | None => Err(Refusal::NoMachine),
        }
    }

    /// The machine, if no migration has it.
    fn idle_machine(&self) -> Result<&Arc<Machine>, Refusal> {
        if self.migration.is_some() {
            Err(Refusal::Migrating)
        } else {
            self.machine()
        }
    }

    fn control(&self) -> Option<&Arc<Control>> {
        match (&self.migration, &self.life) {
            (Some(migration), _) => Some(&migration.job.control),
            (None, Some(Life::Receiving(job))) => Some(&job.control),
            _ => None,
        }
    }

    fn info(&self) -> InstanceInfo {
        let machine = match &self.life {
            Some(Life::Here(machine) | Life::InDoubt(machine)) => Some(machine),
            Some(Life::Receiving(_)) | None => None,
        };
        let state = match &self.life {
            Some(Life::InDoubt(_)) => InstanceState::InDoubt,
            Some(Life::Here(machine)) if machine.is_held_by(Holder::User) => InstanceState::Paused,
            Some(Life::Here(machine))
                if self.migration.is_none() && machine.is_held_by(Holder::Migration) =>
            {
                InstanceState::Paused
            }
            Some(Life::Here(machine)) if machine.is_held_by(Holder::Startup) => InstanceState::Paused,
            Some(Life::Here(_)) => InstanceState::Running,
            Some(Life::Receiving(_)) | None => InstanceState::Receiving,
        };
        InstanceInfo {
            app_name: "godwit".into(),
            id: self.name.clone(),
            state,
            vmm_version: VERSION.into(),
            pid: std::process::id(),
            vcpu_count: machine.map_or(0, |machine| machine.cpus()),
            mem_size_mib: machine.map_or(0, |machine| machine.memory_size() >> 20),
            cpu_template: machine.map_or_else(String::new, |machine| machine.template().to_string()),
            migration: self.control().map(|control| control.progress()),
        }
    }

    fn pause(&self) -> Result<(), Refusal> {
        self.idle_machine()?.pause(Holder::User).map(drop).map_err(failed)
    }

    fn resume(&self) -> Result<(), Refusal> {
        let machine = self.idle_machine()?;
        if machine.is_held_by(Holder::Migration) {
            // One that failed could not give the guest back: somebody had its disks.
            machine.take_back().map_err(failed)?;
        }
        machine.resume(Holder::User);
        Ok(())
    }

    fn press_power_button(&self) -> Result<(), Refusal> {
        self.idle_machine()?.press_power_button().map_err(failed)
    }

    fn migrate(&mut self, destination: Endpoint, options: MigrateOptions) -> Result<MigrationFeed, Refusal> {
        let machine = self.idle_machine()?.clone();
        let control = Arc::new(Control::new().map_err(failed)?);
        let (reports, report) = broadcast::channel(1);
        let thread = jobs::start_migration(
            machine,
            destination,
            options,
            control.clone(),
            self.handle.clone(),
        )
        .map_err(failed)?;
        let job = Job {
            control: control.clone(),
            thread,
        };
        self.migration = Some(MigrationJob { job, reports });
        Ok(MigrationFeed { control, report })
    }

    fn cancel(&self) -> Result<(), Refusal> {
        self.migration
            .as_ref()
            .ok_or(Refusal::NoMigration)?
            .job
            .control
            .cancel();
        Ok(())
    }

    /// First time: the power button. Second time, or where nobody would hear the button: the end.
    fn terminate(&mut self) -> Option<Ending> {
        if self.call_off() {
            return None;
        }
        if self.stop_at.is_some() {
            return Some(Ending::Stopped);
        }
        if let Some(migration) = &self.migration {
            migration.job.control.cancel();
        }
        let Ok(machine) = self.machine() else {
            return Some(Ending::Stopped);
        };
        if machine.is_held_by(Holder::User) {
            return Some(Ending::Stopped);
        }
        if let Err(error) = machine.press_power_button() {
            tracing::warn!(%error, "stopping without the power button");
            return Some(Ending::Stopped);
        }
        tracing::info!(
            "asked the guest to shut down; it has {POWER_OFF_GRACE:?}, a second time ends it at once"
        );
        self.stop_at = Some(Instant::now() + POWER_OFF_GRACE);
        None
    }

    /// Calls off waiting for a machine, if that is what goes on. The job then says how it ended: after
    /// "ready" it cannot be called off, and a machine that arrives all the same is the only copy of its guest.
    fn call_off(&mut self) -> bool {
        let Some(Life::Receiving(job)) = &self.life else {
            return false;
        };
        job.control.cancel();
        self.leaving = true;
        true
    }

    fn migration_ended(&mut self, report: Report) -> Option<Ending> {
        let outcome = report.outcome;
        if let Some(migration) = self.migration.take() {
            // Nobody needs to be waiting for it.
            let _ = migration.reports.send(report);
        }
        match outcome {
            Outcome::Moved => Some(Ending::Moved),
            Outcome::InDoubt => {
                if let Some(Life::Here(machine)) = self.life.take() {
                    self.life = Some(Life::InDoubt(machine));
                }
                None
            }
            Outcome::Failed | Outcome::Cancelled => None,
        }
    }

    /// Ends the migration under way, if there is one, and hands its report to whoever asked for it. If the end
    /// came too late for it, the guest was moved and not stopped.
    fn settle(&mut self, ending: Result<Ending, SupervisorError>) -> Result<Ending, SupervisorError> {
        let Some(MigrationJob { job, reports }) = self.migration.take() else {
            return ending;
        };
        job.end();
        let report = self.events.try_iter().find_map(|event| match event {
            Event::MigrationEnded(migrated) => Some(migrated.report),
            _ => None,
        });
        let Some(mut report) = report else {
            return ending;
        };
        let moved = report.outcome == Outcome::Moved;
        if !moved {
            let before = report
                .error
                .take()
                .map_or_else(String::new, |error| format!("{error}; "));
            report.error = Some(format!("{before}the VM has ended meanwhile"));
        }
        // Nobody needs to be waiting for it.
        let _ = reports.send(report);
        if moved { Ok(Ending::Moved) } else { ending }
    }

    /// Everything goes in order: jobs, machine, console, API.
    fn end(mut self, server: ApiServer) {
        if let Some(Life::Receiving(job)) = self.life.take() {
            job.end();
        }
        drop(self.receiver.take());
        self.console.flush();
        drop(server);
    }
}

fn answer<T>(reply: request::Reply<T>, result: Result<T, Refusal>) {
    // Whoever asked may have gone; what was asked for is done all the same.
    let _ = reply.send(result);
}

fn failed(error: impl std::error::Error) -> Refusal {
    Refusal::Failed(migration::chain(&error))
}
