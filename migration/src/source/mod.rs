//! The source's side of a migration: runs its phases in order, and after a failure undoes what they did.
//!
//! Who may run the guest is decided by [`Claim`] alone. Nothing here lets the guest run once "go" may have been sent,
//! unless the destination answered that it gave the machine up.

mod commit;
mod crew;
mod doubt;
mod error;
mod handshake;
mod hot;
mod mirror;
mod observe;
mod pacer;
mod pass;
mod precopy;
mod rehearse;
mod remains;
mod space;
mod spare;
mod squeeze;
mod stream;
mod switch;
mod unused;

pub use doubt::{Answer, AskError, Doubt};
use error::MigrateError;
pub use remains::Remains;
use remains::undo_step;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use migration_io::{GuestMemory, PAGE_SIZE};

use crate::commit::Claim;
use crate::control::Control;
use crate::link::{KeepAlive, Link, LinkError};
use crate::options::MigrateOptions;
use crate::ports::{PortError, Source};
use crate::protocol::{MemoryTransfer, Token};
use crate::report::{DataPath, Outcome, Report, ms};
use crate::text::{chain, panic_message};
use crate::transport::{Connection, Endpoint};
use crew::Crew;
use handshake::Agreed;
use observe::Observer;
use pacer::Pacer;
use precopy::Left;
use space::Space;

/// How a migration ended at the source.
#[derive(Clone, Debug, PartialEq)]
pub struct Migrated {
    /// What the migration did.
    pub report: Report,
    /// Set if the outcome is in doubt: the question to the destination.
    pub doubt: Option<Doubt>,
    /// Set if the guest runs at the source, and the destination may be ready and not know it: the question to ask until
    /// there is an answer. If the answer is that the guest runs (or is kept) there, an operator has decided so, and it
    /// must not run on at the source.
    pub unanswered: Option<Doubt>,
    /// What is left to be undone once the guest is known to be here.
    pub remains: Remains,
}

impl Migrated {
    /// For a caller that does not know how a migration ended, after a panic: the guest may run at either side.
    pub fn unknown(options: &MigrateOptions) -> Self {
        let mut report = Report::new(ms(options.max_downtime));
        report.outcome = Outcome::InDoubt;
        report.add_error("the migration engine panicked");
        Self {
            report,
            doubt: None,
            unanswered: None,
            remains: Remains::all(),
        }
    }
}

/// Moves a machine to the destination that listens at `to`.
///
/// Blocks until the migration has ended; another thread watches and cancels it through `control`. Whatever
/// ends it before "go" leaves the guest as it was, with dirty logging off: the report then says `failed` or
/// `cancelled`. After "go" the guest stays paused, whether it was moved or the outcome is in doubt, unless the
/// destination answers that it gave the machine up.
pub fn migrate(
    source: &mut dyn Source,
    to: &Endpoint,
    options: &MigrateOptions,
    control: &Control,
) -> Migrated {
    control.begin();
    let mut job = SourceJob {
        source,
        to: to.clone(),
        options,
        control,
        started: Instant::now(),
        report: Report::new(ms(options.max_downtime)),
        standing: Standing::default(),
        token: None,
        passes: 0,
        failure_handled: false,
        unanswered: false,
    };
    match Connection::connect(to, options.connect_timeout, control) {
        Ok(connection) => {
            // Of the host's addresses the one that answered: streams and later questions must reach the same receiver.
            job.to = connection.peer().clone();
            let result = job.run(&connection);
            let to = job.to.clone();
            job.conclude(result, &format!("migration to {to}: "))
        }
        // The error names the destination itself.
        Err(error) => job.conclude(Err(error.into()), ""),
    }
}

/// One migration under way.
struct SourceJob<'a> {
    source: &'a mut dyn Source,
    to: Endpoint,
    options: &'a MigrateOptions,
    control: &'a Control,
    started: Instant,
    report: Report,
    standing: Standing,
    /// The migration's name, once the destination has given it one.
    token: Option<Token>,
    /// Passes over pages so far; the wire calls each of them a round.
    passes: u32,
    /// Whether [`SourceJob::handle_failure`] has run.
    failure_handled: bool,
    /// Whether the destination may be ready and not know that the guest runs at the source.
    unanswered: bool,
}

/// What has to be undone after a failure. Each part is set before the call that it is about, so that it also holds when
/// the call fails half-way or panics.
#[derive(Clone, Copy, Debug, Default)]
struct Standing {
    remains: Remains,
    /// Which side may run the guest.
    claim: Claim,
}

impl<'a> SourceJob<'a> {
    /// Runs the migration, and after a failure before "go" undoes what it did.
    fn run(&mut self, connection: &Connection) -> Result<(), MigrateError> {
        let alive = KeepAlive::new(self.options.io_timeout);
        let mut link = self.link(connection);
        thread::scope(|scope| {
            alive.start(scope, link.pulse()).map_err(MigrateError::Thread)?;
            let result = self.catch_panic(|job| job.transfer(&mut link));
            alive.stop();
            self.report.bytes_sent += link.bytes_sent();
            self.handle_failure(&mut link, result)
        })
    }

    /// Runs a part of the migration. A panic in it becomes an error like any other.
    fn catch_panic(
        &mut self,
        part: impl FnOnce(&mut Self) -> Result<(), MigrateError>,
    ) -> Result<(), MigrateError> {
        catch_unwind(AssertUnwindSafe(|| part(self)))
            .unwrap_or_else(|panic| Err(MigrateError::Panic(panic_message(&*panic))))
    }

    /// After a failure, lets the guest run if it may and aborts the migration at the destination. Only the first call
    /// does so. It comes before the streams are joined: a stream that hangs in a read must not hold up a guest that is
    /// paused.
    fn handle_failure(
        &mut self,
        link: &mut Link<'_>,
        mut result: Result<(), MigrateError>,
    ) -> Result<(), MigrateError> {
        if std::mem::replace(&mut self.failure_handled, true) {
            return result;
        }
        if self.standing.claim.in_doubt()
            && let Err(error) = result
        {
            result = self.settle_doubt(error);
        }
        let Err(error) = result else { return Ok(()) };
        if let Some(failed) = self.standing.claim.fail() {
            // The guest first: without "go" only an operator can have the destination run it.
            self.undo(failed.resume);
            link.abort(self.was_cancelled(&error), &chain(&error));
            // A closed connection does not show that the destination received the abort: a proxy in between may have
            // closed it. Only an answer shows that.
            if failed.withdraw && !matches!(&error, MigrateError::Link(error) if error.is_abort()) {
                self.withdraw();
            }
        }
        Err(error)
    }

    /// The phases of a migration that succeeds.
    fn transfer(&mut self, link: &mut Link<'_>) -> Result<(), MigrateError> {
        let agreed = self.handshake(link)?;
        self.token = Some(agreed.token);
        let memory = self.source.memory();
        match agreed.transfer {
            MemoryTransfer::Handover => {
                self.report.data_path = DataPath::Handover;
                self.hand_over(link, &memory, &agreed)
            }
            MemoryTransfer::Streams(count) => self.copy_over(link, &memory, &agreed, count),
        }
    }

    /// Copies memory and disks over data streams, and hands the guest over.
    fn copy_over(
        &mut self,
        link: &mut Link<'_>,
        memory: &GuestMemory,
        agreed: &Agreed,
        streams: u32,
    ) -> Result<(), MigrateError> {
        let connections = self.open_streams(agreed, streams)?;
        self.report.streams = streams;
        let disks = self.start_mirror(&agreed.disks)?;
        tracing::debug!(round_trip = ?agreed.round_trip, "streams");
        let pacer = Pacer::new(self.options.bandwidth, Instant::now());
        let space = Space::new(self.source.describe().memory, memory, disks)?;
        let crew = Crew::new(space, &connections, pacer, agreed.compression);
        thread::scope(|scope| {
            // Ends the streams' threads on every way out.
            let _end = EndCrew(&crew);
            let (options, control) = (self.options, self.control);
            crew.start(scope, |connection| {
                Link::new(connection, control, options.io_timeout, options.step_timeout)
            })
            .map_err(MigrateError::Thread)?;
            let result = self.catch_panic(|job| job.copy(link, &crew, agreed.round_trip));
            self.count(&crew);
            if result.is_err() {
                crew.end();
            }
            // Before the scope joins the threads, of which one may hang.
            self.handle_failure(link, result)
        })
    }

    /// The part of [`SourceJob::copy_over`] during which the streams run.
    fn copy(
        &mut self,
        link: &mut Link<'_>,
        crew: &Crew<'_>,
        round_trip: Duration,
    ) -> Result<(), MigrateError> {
        let left = self
            .copy_running(link, crew, round_trip)
            .map_err(|error| match error {
                // The guest runs, so there is time to wait for the destination's reason.
                MigrateError::Link(LinkError::Io { .. } | LinkError::Closed { .. }) => {
                    link.await_abort().map_or(error, MigrateError::from)
                }
                error => error,
            })?;
        let stopped = self.stop_and_copy(link, crew, left)?;
        self.commit(link, stopped, round_trip)
    }

    /// Copies disks and memory while the guest runs.
    fn copy_running(
        &mut self,
        link: &mut Link<'_>,
        crew: &Crew<'_>,
        round_trip: Duration,
    ) -> Result<Left, MigrateError> {
        let spare = self.spare_streams();
        self.mirror(link, crew)?;
        self.standing.remains.logging = true;
        let log = self.call("start_dirty_log", |source| source.start_dirty_log())?;
        crew.space.set_log(log);
        let mut watch = Observer::new(self, round_trip);
        watch.spare = spare;
        self.precopy(link, crew, &mut watch)
    }

    fn count(&mut self, crew: &Crew<'_>) {
        let (data, zero) = crew.counts.pages();
        let (disk_data, disk_zero) = crew.counts.disk_pages();
        self.report.pages_sent = data - disk_data;
        self.report.pages_zero += zero - disk_zero;
        self.report.disk_bytes = disk_data * PAGE_SIZE;
        self.report.bytes_sent += crew.counts.wire();
        if crew.counts.zerocopy.load(Ordering::Relaxed) {
            self.report.data_path = DataPath::Zerocopy;
        }
    }

    /// Resumes the guest if the migration has paused it, and undoes what else the migration did to the machine. Errors
    /// and panics of the machine go to the log and the report: no caller could handle them.
    fn undo(&mut self, resume: bool) {
        let mut errors = Vec::new();
        if resume {
            errors.extend(undo_step(self.source, "resume", |source| source.resume()));
            self.control.lift_pause_limit();
        }
        errors.extend(self.standing.remains.undo(self.source));
        for error in errors {
            tracing::error!(%error, "the machine could not be put back as it was");
            self.report.add_error(&error);
        }
    }

    fn conclude(mut self, result: Result<(), MigrateError>, prefix: &str) -> Migrated {
        self.control.end();
        self.report.total_ms = ms(self.started.elapsed());
        self.report.outcome = match &result {
            Ok(()) => Outcome::Moved,
            // An error after "resumed" does not change that the guest runs at the destination.
            Err(_) if self.standing.claim == Claim::Moved => Outcome::Moved,
            Err(_) if self.standing.claim.in_doubt() => Outcome::InDoubt,
            Err(error) if self.was_cancelled(error) => Outcome::Cancelled,
            Err(_) => Outcome::Failed,
        };
        if let Err(error) = &result {
            self.report.put_error_first(&format!("{prefix}{}", chain(error)));
        }
        let question = self.token.map(|token| Doubt::new(self.to.clone(), token));
        let in_doubt = self.report.outcome == Outcome::InDoubt;
        Migrated {
            report: self.report,
            doubt: question.clone().filter(|_| in_doubt),
            unanswered: question.filter(|_| self.unanswered),
            remains: self.standing.remains,
        }
    }

    /// Frames over a connection, with this migration's time-outs.
    fn link<'b>(&self, connection: &'b Connection) -> Link<'b>
    where
        'a: 'b,
    {
        Link::new(
            connection,
            self.control,
            self.options.io_timeout,
            self.options.step_timeout,
        )
    }

    fn was_cancelled(&self, error: &MigrateError) -> bool {
        matches!(error, MigrateError::Link(LinkError::Cancelled)) || self.control.is_cancelled()
    }

    /// Calls the machine.
    fn call<T>(
        &mut self,
        call: &'static str,
        port: impl FnOnce(&mut dyn Source) -> Result<T, PortError>,
    ) -> Result<T, MigrateError> {
        port(self.source).map_err(|source| MigrateError::Machine { call, source })
    }
}

/// An error if the migration was cancelled or the pause has lasted for too long.
fn check_interruption(control: &Control) -> Result<(), MigrateError> {
    match control.interruption() {
        Some(interruption) => Err(LinkError::from(interruption).into()),
        None => Ok(()),
    }
}

/// Ends the streams' threads when it is dropped.
struct EndCrew<'a, 'b>(&'a Crew<'b>);

impl Drop for EndCrew<'_, '_> {
    fn drop(&mut self) {
        self.0.end();
    }
}
