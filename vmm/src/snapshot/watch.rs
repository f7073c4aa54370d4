//! Shows how far a snapshot is, and carries a cancel to the threads that write or read it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use api::SnapshotProgress;

use super::SnapshotError;

/// Shared by the thread that writes or reads a snapshot and the one that waits for it.
#[derive(Debug, Default)]
pub struct SnapshotWatch {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl SnapshotWatch {
    /// How far it is.
    pub fn progress(&self) -> SnapshotProgress {
        SnapshotProgress {
            done_bytes: self.done.load(Ordering::Relaxed),
            total_bytes: self.total.load(Ordering::Relaxed),
        }
    }

    /// Asks for an early end.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Begins to count anew, up to `total`.
    pub(super) fn begin(&self, total: u64) {
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// Counts bytes as done. An error if an early end was asked for.
    pub(super) fn advance(&self, bytes: u64) -> Result<(), SnapshotError> {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.check()
    }

    /// An error where an early end was asked for.
    pub(super) fn check(&self) -> Result<(), SnapshotError> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(SnapshotError::Cancelled);
        }
        Ok(())
    }
}
