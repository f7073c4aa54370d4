//! The command line.

mod args;
mod balloon;
mod client;
mod detach;
mod devices;
mod help;
mod launch;
mod limits;
mod logs;
mod lost_memory;
mod metrics;
mod migrate;
mod owner;
mod place;
mod progress;
mod report;
mod resources;
mod signals;
mod snapshot;
mod stdin;
mod terminal;
mod units;
mod vsock;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};

use crate::config::ConfigError;
use crate::output;
use crate::rundir::RundirError;

/// Exit codes that scripts can rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed; a guest that ran still runs where it ran.
    Failed = 1,
    /// Bad usage.
    Usage = 2,
    /// A migration is in doubt.
    InDoubt = 3,
    /// The guest panicked, or could not handle a fault.
    GuestFailed = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// Parses the arguments and does what they say.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let exit = if error.use_stderr() {
                Exit::Usage
            } else {
                Exit::Done
            };
            // Nowhere to report to if the terminal is gone.
            let _ = error.print();
            return exit.into();
        }
    };
    output::tell_of_panics();
    // A panic has been told of by the hook.
    let done = catch_unwind(AssertUnwindSafe(|| dispatch(cli.command))).unwrap_or_else(|_| Ok(Exit::Failed));
    let exit = done.unwrap_or_else(|error| {
        output::tell(&format!("{error:#}"));
        if is_usage(&error) {
            Exit::Usage
        } else {
            Exit::Failed
        }
    });
    output::flush();
    exit.into()
}

/// Whether the arguments were wrong, rather than the world.
fn is_usage(error: &anyhow::Error) -> bool {
    let name = error.downcast_ref::<RundirError>();
    matches!(name, Some(RundirError::BadName { .. }))
        || error.downcast_ref::<ConfigError>().is_some()
        || error.downcast_ref::<report::OtherKind>().is_some()
}

fn dispatch(command: Command) -> anyhow::Result<Exit> {
    match command {
        Command::Run(args) => launch::run(*args),
        Command::Receive(args) => launch::receive(args),
        Command::Restore(args) => launch::restore(args),
        Command::Migrate(args) => migrate::run(args),
        Command::Snapshot(args) => snapshot::run(args),
        Command::Balloon(args) => balloon::run(&args),
        Command::Metrics(args) => metrics::run(&args),
        Command::Disk(args) => client::disk(&args),
        Command::Status(args) => client::status(&args),
        Command::Cancel(args) => client::cancel(&args),
        Command::Resolve(args) => client::resolve(&args),
        Command::Pause(args) => client::pause(&args),
        Command::Resume(args) => client::resume(&args),
        Command::Stop(args) => client::stop(&args),
        Command::Ps(args) => client::ps(&args),
        Command::Console(args) => client::console(&args),
        Command::Logs(args) => logs::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Probe(args) => crate::probe::run(args.json),
    }
}
