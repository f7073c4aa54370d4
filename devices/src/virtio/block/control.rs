//! The host's end of a disk: what can be changed while the guest uses it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::backend::{BlockBackend, BlockBackendError};
use crate::rate::Limits;

/// The host's end of a disk.
#[derive(Debug)]
pub struct BlockControl {
    backend: Arc<BlockBackend>,
    limits: Mutex<Limits>,
    /// Readable when something has changed.
    event: OwnedFd,
}

impl BlockControl {
    pub(super) fn new(backend: Arc<BlockBackend>, limits: Limits) -> io::Result<Self> {
        Ok(Self {
            backend,
            limits: Mutex::new(limits),
            event: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
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
            self.raise();
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
        self.raise();
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Whether something has changed since this was asked last.
    pub(super) fn take_event(&self) -> bool {
        rustix::io::read(&self.event, &mut [0; 8]).is_ok()
    }

    fn raise(&self) {
        // If the counter is full the device thread will look anyway.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}
