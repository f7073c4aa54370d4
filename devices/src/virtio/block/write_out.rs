//! Has what an image's data are found by put into its file in time: a process that is killed takes what is in its
//! memory along, and the guest was told that it is written.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::backend::BlockBackend;
use crate::timer::Timer;

/// For so long it may be in this process alone.
const WITHIN: Duration = Duration::from_secs(1);

/// Of one image.
pub(super) struct WriteOut {
    timer: Timer,
    /// There is a time for it, or it is under way.
    is_scheduled: bool,
}

impl WriteOut {
    /// For what is behind a device, if that is an image.
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

    /// Becomes readable when it is time.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Sees to it that there will be a time, if something is to be written out.
    pub(super) fn schedule(&mut self, backend: &BlockBackend) -> io::Result<()> {
        if !self.is_scheduled && backend.needs_write_out() {
            self.timer.set(WITHIN)?;
            self.is_scheduled = true;
        }
        Ok(())
    }

    /// Whether it is time.
    pub(super) fn is_due(&self) -> bool {
        !matches!(self.timer.has_gone_off(), Ok(false))
    }

    /// It is under way now, or is not any more.
    pub(super) fn set_running(&mut self, is_running: bool) {
        self.is_scheduled = is_running;
    }
}
