//! A program on a host.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;

use crate::connection::{LabConnection, Missed, Transcript};
use crate::host::Identity;
use crate::wire::{LONGEST, LabFrameKind};
use crate::{LabError, WaitLimit};

/// What a program that has ended left behind.
#[derive(Clone, Debug)]
pub struct LabOutput {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it printed on standard error.
    pub stderr: String,
}

/// Signals that tests send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGHUP.
    Hangup = 1,
    /// SIGINT.
    Interrupt = 2,
    /// SIGKILL.
    Kill = 9,
    /// SIGTERM.
    Terminate = 15,
    /// SIGCONT.
    Continue = 18,
    /// SIGSTOP.
    Stop = 19,
}

/// A program that was started on a host; dropping it kills it. All that it prints is kept (64 MiB at most).
#[derive(Debug)]
pub struct LabProcess {
    connection: Arc<LabConnection>,
    host: Arc<Identity>,
    number: u32,
    command: String,
    /// Lines before this one have been checked by `wait_line`.
    next_line: usize,
}

impl LabProcess {
    pub(crate) fn start(
        connection: Arc<LabConnection>,
        host: Arc<Identity>,
        how: LabFrameKind,
        words: &[&str],
    ) -> Result<Self, LabError> {
        let number = connection.spawn(how, words).map_err(|_| host.gone())?;
        Ok(Self {
            connection,
            host,
            number,
            command: words.join(" "),
            next_line: 0,
        })
    }

    /// Writes to the program's standard input.
    pub fn write_stdin(&self, bytes: &[u8]) -> Result<(), LabError> {
        bytes
            .chunks(LONGEST)
            .try_for_each(|piece| self.send(LabFrameKind::Stdin, piece))
    }

    /// Ends the program's standard input.
    pub fn close_stdin(&self) -> Result<(), LabError> {
        self.send(LabFrameKind::Stdin, &[])
    }

    /// Sends a signal; one to a program that has ended is lost.
    pub fn signal(&self, signal: Signal) -> Result<(), LabError> {
        self.send(LabFrameKind::Signal, &(signal as i32).to_le_bytes())
    }

    /// Waits for the first line, of standard output or error, that `matches` among those that this function has
    /// not checked before.
    pub fn wait_line(
        &mut self,
        mut matches: impl FnMut(&str) -> bool,
        within: impl Into<WaitLimit>,
    ) -> Result<String, LabError> {
        let within = within.into();
        let mut next = self.next_line;
        let found = self.connection.wait_for(self.number, within.begin(), |seen| {
            while let Some(line) = seen.lines.get(next) {
                next += 1;
                if matches(line) {
                    return Some(Ok(line.clone()));
                }
            }
            ending(seen).map(Err)
        });
        self.next_line = next;
        match found {
            Ok(Ok(line)) => Ok(line),
            Ok(Err(end)) => Err(self.ended_early(end)),
            Err(missed) => Err(self.missed(missed, "a line", within)),
        }
    }

    /// Everything that it has printed, in whole lines.
    pub fn log(&self) -> String {
        self.connection
            .with_transcript(self.number, |seen| seen.lines.join("\n"))
            .unwrap_or_default()
    }

    /// Bytes that it has printed on standard output from byte `from` on, as soon as there are any or it has
    /// ended. For terminals.
    pub fn read_stdout(&self, from: usize, within: impl Into<WaitLimit>) -> Result<Vec<u8>, LabError> {
        let within = within.into();
        let found = self.connection.wait_for(self.number, within.begin(), |seen| {
            let new = seen.stdout.get(from..).unwrap_or_default();
            (!new.is_empty() || ending(seen).is_some()).then(|| new.to_vec())
        });
        found.map_err(|missed| self.missed(missed, "output", within))
    }

    /// Waits for the end of the program and of its output: a program of its own that it leaves behind with the
    /// same standard output counts.
    pub fn wait(&mut self, within: impl Into<WaitLimit>) -> Result<LabOutput, LabError> {
        let within = within.into();
        let found = self.connection.wait_for(self.number, within.begin(), |seen| {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let output = |status| LabOutput {
                status: ExitStatus::from_raw(status),
                stdout: text(&seen.stdout),
                stderr: text(&seen.stderr),
            };
            ending(seen).map(|end| end.map(output))
        });
        match found {
            Ok(Ok(output)) => Ok(output),
            Ok(Err(reason)) => Err(self.refused(reason)),
            Err(missed) => Err(self.missed(missed, "its end", within)),
        }
    }

    fn send(&self, kind: LabFrameKind, body: &[u8]) -> Result<(), LabError> {
        self.connection
            .send(kind, self.number, body)
            .map_err(|_| self.host.gone())
    }

    fn refused(&self, reason: String) -> LabError {
        LabError::Refused {
            host: self.host.index,
            command: self.command.clone(),
            reason,
        }
    }

    fn ended_early(&self, end: Result<i32, String>) -> LabError {
        match end {
            Err(reason) => self.refused(reason),
            Ok(status) => LabError::Ended {
                host: self.host.index,
                command: self.command.clone(),
                status: ExitStatus::from_raw(status).to_string(),
                log: self.log(),
            },
        }
    }

    fn missed(&self, missed: Missed, what: &str, within: WaitLimit) -> LabError {
        match missed {
            Missed::Host => self.host.gone(),
            Missed::Time => LabError::TimedOut {
                host: self.host.index,
                command: self.command.clone(),
                what: what.to_owned(),
                within,
                log: self.log(),
            },
        }
    }
}

impl Drop for LabProcess {
    fn drop(&mut self) {
        let running = self
            .connection
            .with_transcript(self.number, |seen| ending(seen).is_none());
        if running == Some(true) {
            // Fails if the host is gone, and the process with it.
            let _ = self.signal(Signal::Kill);
        }
        self.connection.remove(self.number);
    }
}

/// Wait status, or why it was not started.
fn ending(seen: &Transcript) -> Option<Result<i32, String>> {
    match &seen.refused {
        Some(reason) => Some(Err(reason.clone())),
        None => seen.ended.map(Ok),
    }
}
