//! The host side of port 0: a terminal.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::wake_event::WakeEvent;

/// Bytes of input that wait for the guest before [`ConsoleTerminal::enqueue`] refuses more.
pub const INPUT_LIMIT: usize = 64 << 10;

/// The size of a terminal in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Characters of a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// The terminal of port 0. Its functions may be called from any thread.
pub struct ConsoleTerminal {
    /// Raised when there is input or a new size.
    event: WakeEvent,
    side: Mutex<TerminalInner>,
}

#[derive(Default)]
struct TerminalInner {
    output: Option<Box<dyn Write + Send>>,
    input: VecDeque<u8>,
    size: Option<TerminalSize>,
}

impl ConsoleTerminal {
    /// A terminal without output and size.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: WakeEvent::new()?,
            side: Mutex::default(),
        })
    }

    /// Sets where the guest's output goes; `output` must not block.
    pub fn connect(&self, output: Box<dyn Write + Send>) {
        self.side().output = Some(output);
    }

    /// Queues `bytes` as input; returns how many fitted. Offer the others again once the guest has read.
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        let mut side = self.side();
        let taken = bytes.len().min(INPUT_LIMIT.saturating_sub(side.input.len()));
        side.input.extend(&bytes[..taken]);
        drop(side);
        self.event.raise();
        taken
    }

    /// Sets the terminal's size.
    pub fn resize(&self, size: TerminalSize) {
        self.side().size = Some(size);
        self.event.raise();
    }

    pub(super) fn size(&self) -> Option<TerminalSize> {
        self.side().size
    }

    /// Writes the guest's output.
    pub(super) fn show(&self, bytes: &[u8]) {
        if let Some(output) = &mut self.side().output {
            // An error of the output does not stop the guest's printing.
            let _ = output.write_all(bytes);
        }
    }

    /// Takes the first bytes of the input off, at most as many as fit into `room`.
    pub(super) fn read_input(&self, room: &mut [u8]) -> usize {
        let mut side = self.side();
        let count = room.len().min(side.input.len());
        for (to, from) in room.iter_mut().zip(side.input.drain(..count)) {
            *to = from;
        }
        count
    }

    /// The input that waits.
    pub(super) fn input(&self) -> Vec<u8> {
        self.side().input.iter().copied().collect()
    }

    /// Replaces the input that waits.
    pub(super) fn set_input(&self, input: Vec<u8>) {
        self.side().input = input.into();
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Clears the event, before the device reads what has changed.
    pub(super) fn clear_event(&self) {
        self.event.clear();
    }

    fn side(&self) -> MutexGuard<'_, TerminalInner> {
        self.side.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for ConsoleTerminal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = self.side();
        f.debug_struct("ConsoleTerminal")
            .field("input", &side.input.len())
            .field("size", &side.size)
            .finish_non_exhaustive()
    }
}
