//! The host's end of a disk: what can be changed while the guest uses it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::backend::BlockBackend;
use super::error::BlockBackendError;
use crate::rate::Limits;
use crate::wake_event::WakeEvent;

/// The host's end of a disk.
#[derive(Debug)]
pub struct BlockControl {
    backend: Arc<BlockBackend>,
    limits: Mutex<Limits>,
    /// Raised when the size or the limits have changed.
    event: WakeEvent,
}

impl BlockControl {
    pub(super) fn new(backend: Arc<BlockBackend>, limits: Limits) -> io::Result<Self> {
        Ok(Self {
            backend,
            limits: Mutex::new(limits),
            event: WakeEvent::new()?,
        })
    }

    /// What is behind it.
    pub fn backend(&self) -> &Arc<BlockBackend> {
        &self.backend
    }

    /// Where the disk is.
    pub fn path(&self) -> &Path {
        self.backend.path()
    }

    /// Looks how large the disk is now, in bytes, and has the guest told if that is news.
    pub fn resize(&self) -> Result<u64, BlockBackendError> {
        let before = self.backend.sectors();
        self.backend.measure()?;
        if self.backend.sectors() != before {
            tracing::info!(disk = %self.backend.path().display(), before, now = self.backend.sectors(), "disk resized");
            self.backend.warn_hidden_tail();
            self.event.raise();
        }
        Ok(self.backend.size())
    }

    /// What the disk may do in a time.
    pub fn limits(&self) -> Limits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces that by limits that were checked. Buckets are full again.
    pub fn set_limits(&self, limits: Limits) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
        self.event.raise();
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Clears the event; whether something has changed since the last call.
    pub(super) fn clear_event(&self) -> bool {
        self.event.clear()
    }
}
