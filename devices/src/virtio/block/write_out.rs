//! Writes an image's metadata to its file within a bounded time: metadata in this process's memory are lost if the
//! process is killed, and with them writes that were answered.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::backend::BlockBackend;
use crate::timer::Timer;

/// How long modified metadata may be in this process's memory only.
const MAX_DELAY: Duration = Duration::from_secs(1);

/// The schedule of one image.
pub(super) struct WriteOut {
    timer: Timer,
    /// Whether the timer is set or a write-out is running.
    is_scheduled: bool,
}

impl WriteOut {
    /// A schedule for the backend, if that is a writable image.
    pub(super) fn of(backend: &BlockBackend) -> io::Result<Option<Self>> {
        if backend.raw_file().is_some() || backend.read_only() {
            return Ok(None);
        }
        let timer = Timer::new()?;
        Ok(Some(Self {
            timer,
            is_scheduled: false,
        }))
    }

    /// Readable when a write-out is due.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Sets the timer if something must be written out and none is scheduled.
    pub(super) fn schedule(&mut self, backend: &BlockBackend) -> io::Result<()> {
        if !self.is_scheduled && backend.needs_write_out() {
            self.timer.set(MAX_DELAY)?;
            self.is_scheduled = true;
        }
        Ok(())
    }

    /// Whether a write-out is due.
    pub(super) fn is_due(&self) -> bool {
        !matches!(self.timer.has_gone_off(), Ok(false))
    }

    /// Notes that a write-out has begun, or that none is running any more.
    pub(super) fn set_running(&mut self, is_running: bool) {
        self.is_scheduled = is_running;
    }
}
