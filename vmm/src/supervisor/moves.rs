//! Migrations: starts and cancels a move to a destination, and takes over a machine that arrives.
//!
//! The job threads do the work; here is only what follows for the machine's owner. A machine that arrived after "go"
//! must be kept whatever else fails: it may be the only copy.

use std::sync::Arc;

use migration::{Control, Endpoint, MigrateOptions, Migrated, Outcome};
use tokio::sync::broadcast;

use super::{
    ApiServer, ArrivedMachine, DoubtSide, EndedMigration, Ending, Event, Life, MigrationFeed, MigrationJob,
    Refusal, Supervisor, SupervisorError, failed, jobs,
};
use crate::footprint::release_text;
use crate::machine::MigrationSource;
use crate::vcpu::Holder;

impl Supervisor {
    /// Starts a migration of the machine. Its end is an event.
    pub(super) fn migrate(
        &mut self,
        destination: Endpoint,
        options: MigrateOptions,
    ) -> Result<MigrationFeed, Refusal> {
        let machine = self.idle_machine()?.clone();
        if machine.is_held_by(Holder::Migration) {
            return Err(Refusal::NotTakenBack);
        }
        let control = Arc::new(Control::new().map_err(failed)?);
        let (reports, report) = broadcast::channel(1);
        let job = jobs::start_migration(
            machine,
            destination,
            options,
            control.clone(),
            self.handle.clone(),
        )
        .map_err(failed)?;
        self.migration = Some(MigrationJob { job, reports });
        Ok(MigrationFeed { control, report })
    }

    /// Cancels the snapshot or the migration under way.
    pub(super) fn cancel(&self) -> Result<(), Refusal> {
        if let Some(snapshot) = &self.snapshot {
            snapshot.cancel();
            return Ok(());
        }
        self.migration
            .as_ref()
            .ok_or(Refusal::NoMigration)?
            .job
            .control
            .cancel();
        Ok(())
    }

    /// Handles the end of a migration: sends the report, and decides what becomes of the machine.
    pub(super) fn migration_ended(
        &mut self,
        ended: EndedMigration,
    ) -> Option<Result<Ending, SupervisorError>> {
        let EndedMigration { migrated, source } = ended;
        let Migrated {
            report,
            doubt,
            unanswered,
            remains,
        } = migrated;
        let outcome = report.outcome;
        if let Some(migration) = self.migration.take() {
            // The client that waited for the report may have gone.
            let _ = migration.reports.send(report);
        }
        match outcome {
            Outcome::Moved => Some(Ok(Ending::Moved)),
            Outcome::InDoubt => {
                // The client that asked to stop the VM expects its guest to end, but the guest runs at the destination.
                self.leaving = false;
                self.stop_at = None;
                if let Some(Life::Here(machine)) = self.life.take() {
                    let source = source.unwrap_or_else(|| Box::new(MigrationSource::new(machine.clone())));
                    let side = DoubtSide::Source {
                        source: Some(source),
                        doubt,
                        remains,
                    };
                    self.life = Some(Life::InDoubt(machine, side));
                }
                None
            }
            Outcome::Failed | Outcome::Cancelled if self.leaving => Some(Ok(Ending::Stopped)),
            Outcome::Failed | Outcome::Cancelled => {
                if let Some(doubt) = unanswered {
                    self.withdraw(doubt);
                }
                self.stop_second_copy();
                self.reset_now()
            }
        }
    }

    /// Cancels the migration under way, if there is one, and sends its report to the client that asked for it. If the
    /// cancel came too late, the guest was moved and not stopped.
    pub(super) fn settle_migration(
        &mut self,
        ending: Result<Ending, SupervisorError>,
    ) -> Result<Ending, SupervisorError> {
        let Some(MigrationJob { job, reports }) = self.migration.take() else {
            return ending;
        };
        job.end();
        let report = self.events.try_iter().find_map(|event| match event {
            Event::MigrationEnded(ended) => Some(ended.migrated.report),
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
        // The client that waited for the report may have gone.
        let _ = reports.send(report);
        if moved { Ok(Ending::Moved) } else { ending }
    }

    /// Takes over a machine that has arrived. It is in doubt if it does not run.
    pub(super) fn received(&mut self, arrived: ArrivedMachine, server: &ApiServer) -> Option<Ending> {
        let ArrivedMachine {
            machine,
            reason,
            receiver,
        } = arrived;
        self.receiver = receiver;
        self.machine_arrived(reason.as_deref());
        if let Some(reason) = reason {
            tracing::error!("received, but the guest stays paused: {reason}");
            self.life = Some(Life::InDoubt(
                Arc::new(machine),
                DoubtSide::Destination { reason },
            ));
            return None;
        }
        tracing::info!("received: the guest runs here");
        self.adopt(machine, server);
        release_text();
        // A process that was to end because a thread failed stays, if the only copy of a guest has arrived in it.
        if self.leaving && self.failure.is_none() {
            return self.terminate();
        }
        self.leaving = false;
        None
    }
}
