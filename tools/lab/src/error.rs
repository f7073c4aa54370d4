//! What can go wrong with a lab.

use std::io;
use std::path::PathBuf;

use crate::WaitLimit;
use crate::cpio::CpioError;

/// Any failure; the text names the thing, what was expected and what came.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A file that hosts are made of cannot be read.
    #[error("cannot read {path}: {source}")]
    Artifact {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The hosts' initramfs cannot be written down.
    #[error(transparent)]
    Archive(#[from] CpioError),
    /// A call of the system failed.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A host did not come up.
    #[error("host {host} expected up within {within}, got {got}; its console:\n{console}")]
    NotUp {
        /// Its number.
        host: usize,
        /// How long it had.
        within: WaitLimit,
        /// What happened instead.
        got: String,
        /// The end of its console log.
        console: String,
    },
    /// The host died, was killed, or was never there.
    #[error("host {host} is gone; its console:\n{console}")]
    HostGone {
        /// Its number.
        host: usize,
        /// The end of its console log.
        console: String,
    },
    /// The host could not start a program.
    #[error("host {host} cannot start {command}: {reason}")]
    Refused {
        /// The host's number.
        host: usize,
        /// The program and its arguments.
        command: String,
        /// The host's reason.
        reason: String,
    },
    /// Something did not happen in time.
    #[error("{command} on host {host}: expected {what} within {within}; its output:\n{log}")]
    TimedOut {
        /// The host's number.
        host: usize,
        /// The program and its arguments.
        command: String,
        /// What was waited for.
        what: String,
        /// How long.
        within: WaitLimit,
        /// What the program has printed so far.
        log: String,
    },
    /// The program ended while a line of its output was waited for.
    #[error("{command} on host {host} ended with {status} before the expected line; its output:\n{log}")]
    Ended {
        /// The host's number.
        host: usize,
        /// The program and its arguments.
        command: String,
        /// How it ended.
        status: String,
        /// What the program has printed.
        log: String,
    },
}

impl LabError {
    /// For `map_err` at a system call: what was tried.
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}
