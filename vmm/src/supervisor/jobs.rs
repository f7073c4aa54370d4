//! The threads of migrations: one that moves the machine away, and one that waits for a machine to arrive. Each reports
//! its end to the supervisor as an event, and changes nothing of the supervisor's itself.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use migration::{Control, Endpoint, MigrateOptions, Migrated, Outcome, Receiver};
use threads::Role;

use super::request::{ArrivedMachine, EndedMigration, Event, SupervisorHandle};
use super::{Job, Life, Supervisor};
use crate::machine::{Machine, MigrationDestination, MigrationSource};

/// Starts to move `machine`; the end is an event to the supervisor.
pub(super) fn start_migration(
    machine: Arc<Machine>,
    destination: Endpoint,
    options: MigrateOptions,
    control: Arc<Control>,
    supervisor: SupervisorHandle,
) -> io::Result<Job> {
    Job::start(Role::Migration, "migration", control.clone(), move || {
        let mut source = MigrationSource::new(machine);
        let migrate = AssertUnwindSafe(|| migration::migrate(&mut source, &destination, &options, &control));
        // The engine catches its own panics and the machine's. After one that it did not catch, it is unknown which
        // side may run the guest.
        let migrated = catch_unwind(migrate).unwrap_or_else(|_| Migrated::unknown(&options));
        if let Some(error) = &migrated.report.error {
            tracing::warn!("migration to {destination} ended: {error}");
        }
        // The supervisor must be the machine's last owner when it handles the event.
        let in_doubt = migrated.report.outcome == Outcome::InDoubt;
        let source = in_doubt.then(|| Box::new(source));
        supervisor.send(Event::MigrationEnded(Box::new(EndedMigration {
            migrated,
            source,
        })));
    })
}

impl Supervisor {
    /// Waits at `receiver` for a machine, on a thread of its own, until one has arrived for good.
    pub fn receive(&mut self, receiver: Receiver, destination: MigrationDestination) -> io::Result<()> {
        let control = Arc::new(Control::new()?);
        let (job_control, supervisor) = (control.clone(), self.handle.clone());
        let job = Job::start(Role::Receive, "receive", control, move || {
            let wait =
                AssertUnwindSafe(|| wait_for_machine(receiver, destination, &job_control, &supervisor));
            let panicked = |_| Event::ReceiveFailed("the receiving job panicked".into());
            supervisor.send(catch_unwind(wait).unwrap_or_else(panicked));
        })?;
        self.life = Some(Life::Receiving(job));
        Ok(())
    }
}

/// Receives until a machine has arrived. A failed attempt is logged, and the next source may connect.
fn wait_for_machine(
    mut receiver: Receiver,
    mut destination: MigrationDestination,
    control: &Control,
    supervisor: &SupervisorHandle,
) -> Event {
    loop {
        if let Err(error) = destination.prepare() {
            tracing::warn!("no memory is held in reserve: {}", migration::chain(&error));
        }
        let (reason, confirmed) = match receiver.receive(&mut destination, control) {
            Ok(received) => (None, received.confirmed),
            Err(error) if error.is_committed() => (Some(migration::chain(&error)), false),
            Err(error) if error.is_final() => {
                return Event::ReceiveFailed(migration::chain(&error));
            }
            Err(error) => {
                let reason = migration::chain(&error);
                tracing::warn!("the machine was not received: {reason}; waiting for the next attempt");
                supervisor.send(Event::AttemptFailed(reason));
                continue;
            }
        };
        return match destination.into_machine() {
            Some(machine) => Event::Received(Box::new(ArrivedMachine {
                machine,
                reason,
                receiver: (!confirmed).then_some(receiver),
            })),
            None => Event::ReceiveFailed("the engine kept no machine".into()),
        };
    }
}
