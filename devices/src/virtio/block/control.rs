//! The host's control of a disk: what can be changed while the guest uses it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::backend::BlockBackend;
use super::error::BlockBackendError;
use crate::rate::Limits;
use crate::wake_event::WakeEvent;

/// The host's control of a disk.
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

    /// The disk's backend.
    pub fn backend(&self) -> &Arc<BlockBackend> {
        &self.backend
    }

    /// The disk's path.
    pub fn path(&self) -> &Path {
        self.backend.path()
    }

    /// Reads the size of the disk's file anew, and has the device report a change to the guest. Returns the size in bytes.
    pub fn refresh_size(&self) -> Result<u64, BlockBackendError> {
        let before = self.backend.sectors();
        self.backend.measure()?;
        if self.backend.sectors() != before {
            tracing::info!(disk = %self.backend.path().display(), before, now = self.backend.sectors(), "disk resized");
            self.backend.warn_hidden_tail();
            self.event.raise();
        }
        Ok(self.backend.size())
    }

    /// The disk's rate limits.
    pub fn limits(&self) -> Limits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the rate limits by others that were checked. Buckets are full again.
    pub fn set_limits(&self, limits: Limits) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
        self.event.raise();
    }

    /// Readable when the size or the limits have changed.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Clears the event; whether something has changed since the last call.
    pub(super) fn clear_event(&self) -> bool {
        self.event.clear()
    }
}
