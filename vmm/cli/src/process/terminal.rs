//! The user's terminal: raw mode, and the escape key.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// Ctrl-]: ends `run`, detaches from `console`.
pub(crate) const ESCAPE: u8 = 0x1d;

/// As long as it lives, the terminal passes every key on. Dropping it restores what was.
pub(crate) struct RawTerminal;

/// The terminal, and what it was at first.
static BEFORE: OnceLock<(File, Termios)> = OnceLock::new();
/// Whether it is raw now.
static IS_RAW: AtomicBool = AtomicBool::new(false);

impl RawTerminal {
    /// `None` if standard input is no terminal.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let terminal = File::from(stdin.as_fd().try_clone_to_owned()?);
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        made_raw(&terminal, &before);
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Some(Self))
    }
}

/// The terminal is raw, or about to be: lines return in it, and [`restore_at_once`] gives it back as it was at first.
pub(crate) fn made_raw(terminal: &File, before: &Termios) {
    if BEFORE.get().is_none()
        && let Ok(terminal) = terminal.try_clone()
    {
        BEFORE.get_or_init(|| (terminal, before.clone()));
    }
    IS_RAW.store(true, Ordering::Relaxed);
    output::set_raw_terminal(true);
}

/// Notes that the terminal has its own modes, or that another job uses it.
pub(crate) fn not_raw() {
    output::set_raw_terminal(false);
    IS_RAW.store(false, Ordering::Relaxed);
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        output::set_raw_terminal(false);
        if let Err(error) = restore() {
            output::print_line(&format!("cannot restore the terminal: {error}; `reset` does"));
        }
    }
}

/// Restores the terminal if it is raw. Can be called in a signal handler.
pub(crate) fn restore_at_once() {
    // The process ends: an error cannot be reported any more.
    let _ = restore();
}

fn restore() -> rustix::io::Result<()> {
    match BEFORE.get() {
        Some((terminal, before)) if IS_RAW.swap(false, Ordering::Relaxed) => {
            tcsetattr(terminal, OptionalActions::Now, before)
        }
        _ => Ok(()),
    }
}
