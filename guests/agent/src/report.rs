//! Lines for the reader of the console, and the counts behind them.

use std::fmt::Arguments;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Errors that are printed; all are counted.
const PRINTED_ERRORS: u64 = 50;

/// What all threads share.
#[derive(Debug, Default)]
pub(crate) struct AgentReport {
    /// Pages dirtied.
    pub(crate) pages: AtomicU64,
    /// Files written.
    pub(crate) files: AtomicU64,
    /// Bytes that came back over the network.
    pub(crate) streamed: AtomicU64,
    /// Random bytes read.
    pub(crate) random: AtomicU64,
    /// Asks the heartbeat to measure the longest gap anew.
    pub(crate) reset: AtomicBool,
    errors: AtomicU64,
}

impl AgentReport {
    /// Prints one event. An error of the console has no other place to be reported.
    pub(crate) fn line(&self, event: Arguments<'_>) {
        let line = format!("agent: {event}\n");
        let _ = std::io::stdout().lock().write_all(line.as_bytes());
    }

    /// Counts an error and prints it, unless there have been very many.
    pub(crate) fn error(&self, what: Arguments<'_>) {
        if self.errors.fetch_add(1, Ordering::Relaxed) < PRINTED_ERRORS {
            self.line(format_args!("error {what}"));
        }
    }

    /// Errors so far.
    pub(crate) fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }
}
