//! The program `godwit`: its command line, what it shows while it works, and pictures of migrations.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]
// Tests start threads that may take their test along.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod args;
mod commands;
mod process;
mod report;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use api::rundir::RundirError;
use clap::Parser;
use vmm::config::ConfigError;

use args::Cli;

/// Exit codes that scripts can rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
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
fn main() -> ExitCode {
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
    output::report_panics();
    // The hook has reported the panic.
    let done =
        catch_unwind(AssertUnwindSafe(|| commands::run(cli.command))).unwrap_or_else(|_| Ok(Exit::Failed));
    let exit = done.unwrap_or_else(|error| {
        output::print_line(&format!("{error:#}"));
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
        || error.downcast_ref::<commands::OtherKind>().is_some()
}
