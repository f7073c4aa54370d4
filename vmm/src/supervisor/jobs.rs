//! Jobs on threads of their own: a migration away, and waiting for one that arrives.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use migration::{Control, Endpoint, Listener, MigrateOptions, ReceiveOptions};

use super::request::{Event, SupervisorHandle};
use super::{Job, Life, Supervisor};
use crate::machine::{Machine, MigrationDestination, MigrationSource};

/// Moves `machine` and tells the supervisor how it ended.
pub(super) fn start_migration(
    machine: Arc<Machine>,
    destination: Endpoint,
    options: MigrateOptions,
    control: Arc<Control>,
    supervisor: SupervisorHandle,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("migration".into())
        .spawn(move || {
            let mut source = MigrationSource::new(machine);
            let report = migration::migrate(&mut source, &destination, &options, &control);
            if let Some(error) = &report.error {
                tracing::warn!("migration to {destination} ended: {error}");
            }
            // The supervisor must be the last owner of the machine when it hears of the end.
            drop(source);
            supervisor.send(Event::MigrationEnded(Box::new(report)));
        })
}

impl Supervisor {
    /// Waits at `listener` for a machine, on a thread of its own, until one has arrived for good.
    pub fn receive(&mut self, listener: Listener, destination: MigrationDestination) -> io::Result<()> {
        let control = Arc::new(Control::new()?);
        let (job_control, supervisor) = (control.clone(), self.handle.clone());
        let thread = std::thread::Builder::new()
            .name("receive".into())
            .spawn(move || {
                let wait = AssertUnwindSafe(|| wait_for_machine(&listener, destination, &job_control));
                let panicked = |_| Event::ReceiveFailed("the receiving job panicked".into());
                supervisor.send(catch_unwind(wait).unwrap_or_else(panicked));
            })?;
        self.life = Some(Life::Receiving(Job { control, thread }));
        Ok(())
    }
}

/// A failed attempt is logged, and the next may come.
fn wait_for_machine(listener: &Listener, mut destination: MigrationDestination, control: &Control) -> Event {
    loop {
        let connection = match listener.accept(control) {
            Ok(connection) => connection,
            Err(error) => return Event::ReceiveFailed(migration::chain(&error)),
        };
        let result = migration::receive(&mut destination, &connection, &ReceiveOptions::default(), control);
        let reason = match result {
            Ok(_) => None,
            Err(error) if error.is_committed() => Some(migration::chain(&error)),
            Err(error) => {
                tracing::warn!(
                    "the machine was not received: {}; waiting for the next attempt",
                    migration::chain(&error)
                );
                continue;
            }
        };
        return match destination.into_machine() {
            Some(machine) => Event::Received(Box::new(machine), reason),
            None => Event::ReceiveFailed("the engine kept no machine".into()),
        };
    }
}
