//! The source's side of a migration.

mod commit;
mod doubt;
mod error;
mod handshake;
mod pages;
mod precopy;
mod switch;

pub use doubt::{Answer, AskError, Doubt};
use error::MigrateError;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use crate::control::Control;
use crate::link::{KeepAlive, Link, LinkError};
use crate::options::MigrateOptions;
use crate::ports::{DirtyLog, MachineError, Source};
use crate::report::{Outcome, Report, ms};
use crate::text::{chain, panic_message};
use crate::transport::{Connection, Endpoint};

/// Moves a machine to the destination that listens at `to`.
///
/// Blocks until the migration has ended; another thread watches and cancels it through `control`. Whatever
/// ends it before "go" leaves the guest as it was, with dirty logging off: the report then says `failed` or
/// `cancelled`. After "go" the guest stays paused, whether it was moved or the outcome is in doubt.
pub fn migrate(
    source: &mut dyn Source,
    to: &Endpoint,
    options: &MigrateOptions,
    control: &Control,
) -> Migrated {
    control.begin();
    let mut job = Job {
        source,
        options,
        control,
        started: Instant::now(),
        report: Report::new(ms(options.max_downtime)),
        standing: Standing::default(),
        log: None,
    };
    let report = match Connection::connect(to, options.connect_timeout) {
        Ok(connection) => {
            let result = job.run(&connection);
            job.conclude(result, &format!("migration to {to}: "))
        }
        // It names the place itself.
        Err(error) => job.conclude(Err(error.into()), ""),
    };
    Migrated { report, doubt: None }
}

/// How a migration ended at the source.
#[derive(Clone, Debug, PartialEq)]
pub struct Migrated {
    /// What it did.
    pub report: Report,
    /// Where it is in doubt: whom to ask.
    pub doubt: Option<Doubt>,
}

/// One migration under way.
struct Job<'a> {
    source: &'a mut dyn Source,
    options: &'a MigrateOptions,
    control: &'a Control,
    started: Instant,
    report: Report,
    standing: Standing,
    log: Option<Arc<dyn DirtyLog>>,
}

/// What has to be undone, or can no longer be. Set before a call is made, so that it also holds when the call
/// fails half-way or panics.
#[derive(Clone, Copy, Debug, Default)]
struct Standing {
    logging: bool,
    paused: bool,
    /// "go" is, perhaps, on its way: the guest is no longer ours.
    gone: bool,
}

impl Job<'_> {
    /// Runs the migration, and after a failure before "go" undoes what it did.
    fn run(&mut self, connection: &Connection) -> Result<(), MigrateError> {
        let (options, control) = (self.options, self.control);
        let new_link = || Link::new(connection, control, options.io_timeout, options.step_timeout);
        let alive = KeepAlive::new(options.io_timeout);
        let mut link = new_link();
        thread::scope(|scope| {
            alive.start(scope, new_link()).map_err(MigrateError::Thread)?;
            let result = catch_unwind(AssertUnwindSafe(|| self.transfer(&mut link, &alive)));
            alive.stop();
            let result = result.unwrap_or_else(|panic| Err(MigrateError::Panic(panic_message(&*panic))));
            self.report.bytes_sent = link.bytes_sent();
            let Err(error) = result else { return Ok(()) };
            if !self.standing.gone {
                // The guest first: without "go" the destination cannot run it, whatever it hears.
                self.undo();
                link.abort(self.was_cancelled(&error), &chain(&error));
            }
            Err(error)
        })
    }

    /// The migration as it goes when nothing goes wrong.
    fn transfer(&mut self, link: &mut Link<'_>, alive: &KeepAlive) -> Result<(), MigrateError> {
        let round_trip = self.handshake(link)?;
        let memory = self.source.memory();
        let copied = self.precopy(link, alive, &memory, round_trip)?;
        let stopped = self.stop_and_copy(link, alive, &memory, copied)?;
        self.commit(link, alive, stopped, round_trip)
    }

    /// Gives the guest back to its user. Errors and panics of the machine go to the log and the report: there
    /// is nobody left to handle them.
    fn undo(&mut self) {
        let Standing { logging, paused, .. } = std::mem::take(&mut self.standing);
        if paused {
            self.undo_step("resume", |source| source.resume());
        }
        if logging {
            self.undo_step("stop_dirty_log", |source| source.stop_dirty_log());
        }
    }

    fn undo_step(
        &mut self,
        call: &'static str,
        step: impl FnOnce(&mut dyn Source) -> Result<(), MachineError>,
    ) {
        let source = &mut *self.source;
        let error = match catch_unwind(AssertUnwindSafe(|| step(source))) {
            Ok(Ok(())) => return,
            Ok(Err(source)) => chain(&MigrateError::Machine { call, source }),
            Err(panic) => format!("{call} panicked: {}", panic_message(&*panic)),
        };
        tracing::error!(%error, "the machine could not be put back as it was");
        self.report.add_error(&error);
    }

    fn conclude(mut self, result: Result<(), MigrateError>, prefix: &str) -> Report {
        self.control.end();
        self.report.total_ms = ms(self.started.elapsed());
        self.report.outcome = match &result {
            Ok(()) => Outcome::Moved,
            Err(_) if self.standing.gone => Outcome::InDoubt,
            Err(error) if self.was_cancelled(error) => Outcome::Cancelled,
            Err(_) => Outcome::Failed,
        };
        if let Err(error) = result {
            self.report.put_error_first(&format!("{prefix}{}", chain(&error)));
        }
        self.report
    }

    fn was_cancelled(&self, error: &MigrateError) -> bool {
        matches!(error, MigrateError::Link(LinkError::Cancelled)) || self.control.is_cancelled()
    }
}
