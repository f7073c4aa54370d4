//! The user's terminal: raw mode, and the escape key.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// Ctrl-]: ends `run`, detaches from `console`.
pub(super) const ESCAPE: u8 = 0x1d;

/// Whether the terminal is raw: it then takes a line feed for no more than that.
static RAW: AtomicBool = AtomicBool::new(false);

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
        RAW.store(true, Ordering::Relaxed);
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        RAW.store(false, Ordering::Relaxed);
        if let Err(error) = tcsetattr(&self.terminal, OptionalActions::Now, &self.before) {
            eprintln!("godwit: cannot restore the terminal: {error}; `reset` does");
        }
    }
}

/// Standard error for whole lines, each of which begins at the left in a raw terminal as well.
pub(super) fn log_writer() -> impl Write {
    let stderr = io::stderr();
    let raw = RAW.load(Ordering::Relaxed) && stderr.is_terminal();
    Lines { out: stderr, raw }
}

struct Lines<W> {
    out: W,
    raw: bool,
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.raw {
            return self.out.write(bytes);
        }
        let mut text = Vec::with_capacity(bytes.len() + 8);
        for byte in bytes {
            if *byte == b'\n' {
                text.push(b'\r');
            }
            text.push(*byte);
        }
        self.out.write_all(&text)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_return_in_a_raw_terminal_only() {
        for (raw, expected) in [(true, "one\r\ntwo\r\n"), (false, "one\ntwo\n")] {
            let mut lines = Lines { out: Vec::new(), raw };
            lines.write_all(b"one\ntwo\n").unwrap();
            assert_eq!(lines.out, expected.as_bytes());
        }
    }
}
