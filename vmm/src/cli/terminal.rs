//! The user's terminal: raw mode, and the escape key.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::output;

/// Ctrl-]: ends `run`, detaches from `console`.
pub(super) const ESCAPE: u8 = 0x1d;

/// As long as it lives, the terminal passes every key on. Dropping it restores what was.
pub(super) struct RawTerminal {
    terminal: File,
    before: Termios,
}

impl RawTerminal {
    /// `None` if standard input is no terminal.
    pub(super) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let terminal = File::from(stdin.as_fd().try_clone_to_owned()?);
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        output::set_raw_terminal(true);
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        output::set_raw_terminal(false);
        if let Err(error) = tcsetattr(&self.terminal, OptionalActions::Now, &self.before) {
            output::tell(&format!("cannot restore the terminal: {error}; `reset` does"));
        }
    }
}
