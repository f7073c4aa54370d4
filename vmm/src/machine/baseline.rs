//! What a machine's next difference is to: its last snapshot, and how the pages written since then are known.
//!
//! ```text
//!  restore (mapped from the file) ──▶ private copies ──┐
//!                                                      ├─▶ snapshot, and the guest goes on ─▶ dirty log ─┐
//!  anything else ───────────────────▶ nothing ─────────┘          ▲                                      │
//!                                        ▲                        └────────── again ─────────────────────┤
//!                                        └────────────── a migration needs the log ──────────────────────┘
//! ```

use std::sync::{Arc, MutexGuard, PoisonError};

use migration::{DirtyLog, MemoryRange, PageSet};

use super::{Machine, MachineError};
use crate::memory::{self, MemoryError};
use crate::snapshot::SnapshotId;

/// The last snapshot, and what is known about the time since.
pub(super) struct Baseline {
    id: SnapshotId,
    written: WrittenSince,
    /// Pages that were written before the log began, where a snapshot in between came to nothing.
    earlier: Option<PageSet>,
}

/// How pages that were written are known.
enum WrittenSince {
    /// Memory is mapped from the snapshot's file; what was written is this process's own, and what was given up is
    /// known to the balloon.
    PrivateCopies,
    /// KVM and the devices log it.
    Log(Arc<dyn DirtyLog>),
}

/// A snapshot that is not on the disk yet. If it comes to nothing and this is dropped, the next difference is to the
/// one before it.
#[must_use]
pub struct Tracking<'a> {
    machine: &'a Machine,
    /// The snapshot before, and what was written since then.
    previous: Option<(SnapshotId, PageSet)>,
    is_kept: bool,
}

impl Machine {
    /// Its memory is the private mapping of that snapshot's file, and was not written yet.
    pub(super) fn based_on(&self, id: &SnapshotId) {
        *self.baseline() = Some(Baseline {
            id: id.clone(),
            written: WrittenSince::PrivateCopies,
            earlier: None,
        });
    }

    /// What a difference would be to. Fails where there is nothing.
    pub fn base(&self) -> Result<SnapshotId, MachineError> {
        let baseline = self.baseline();
        let baseline = baseline.as_ref().ok_or(MachineError::NoBase)?;
        Ok(baseline.id.clone())
    }

    /// The last snapshot, and the pages that may have been written since. Of a machine that stands still.
    pub(super) fn written(&self) -> Result<(SnapshotId, PageSet), MachineError> {
        let baseline = self.baseline();
        baseline.as_ref().ok_or(MachineError::NoBase)?.written(self)
    }

    /// Logs from now on what is written after the snapshot `id`. Of a machine that stands still, whose memory is in
    /// that snapshot.
    pub(super) fn track(&self, id: &SnapshotId) -> Result<Tracking<'_>, MachineError> {
        let mut baseline = self.baseline();
        let previous = baseline.as_ref().map(|before| before.written(self));
        let previous = previous.transpose()?;
        let log = match &*baseline {
            Some(Baseline {
                written: WrittenSince::Log(log),
                ..
            }) => log.clone(),
            // Where that fails half-way, it may be on for a part of memory.
            _ => self.turn_dirty_log_on().inspect_err(|_| self.log_off())?,
        };
        if let Err(error) = clear(&log, &self.memory) {
            if baseline.as_ref().is_some_and(Baseline::is_logged) {
                *baseline = None;
            }
            self.log_off();
            return Err(error);
        }
        *baseline = Some(Baseline {
            id: id.clone(),
            written: WrittenSince::Log(log),
            earlier: None,
        });
        Ok(Tracking {
            machine: self,
            previous,
            is_kept: false,
        })
    }

    fn untrack(&self, previous: Option<(SnapshotId, PageSet)>) {
        let mut baseline = self.baseline();
        let now = baseline.take();
        *baseline = match (now, previous) {
            (Some(now), Some((id, earlier))) => Some(Baseline {
                id,
                earlier: Some(earlier),
                ..now
            }),
            (now, _) => {
                if now.is_some_and(|now| now.is_logged()) {
                    self.log_off();
                }
                None
            }
        };
    }

    fn log_off(&self) {
        if let Err(error) = self.turn_dirty_log_off() {
            tracing::warn!(%error, "dirty logging stays on");
        }
    }

    /// A migration wants the log for itself.
    pub(super) fn release_log(&self) -> Result<(), MachineError> {
        let mut baseline = self.baseline();
        if baseline.as_ref().is_some_and(Baseline::is_logged) {
            *baseline = None;
            self.turn_dirty_log_off()?;
        }
        Ok(())
    }

    fn baseline(&self) -> MutexGuard<'_, Option<Baseline>> {
        self.baseline.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tracking<'_> {
    /// The snapshot is on the disk.
    pub fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Tracking<'_> {
    fn drop(&mut self) {
        if !self.is_kept {
            self.machine.untrack(self.previous.take());
        }
    }
}

impl Baseline {
    fn is_logged(&self) -> bool {
        matches!(self.written, WrittenSince::Log(_))
    }

    fn written(&self, machine: &Machine) -> Result<(SnapshotId, PageSet), MachineError> {
        let mut pages = PageSet::of(&machine.memory).map_err(MemoryError::from)?;
        match &self.written {
            WrittenSince::PrivateCopies => {
                memory::private_copies(&machine.memory, &mut pages)?;
                // No copies, but zeroes now.
                for (gpa, len) in machine.replaced() {
                    pages
                        .insert_range(MemoryRange { gpa, len })
                        .map_err(MemoryError::from)?;
                }
            }
            WrittenSince::Log(log) => log.peek(&mut pages).map_err(MachineError::DirtyLog)?,
        }
        if let Some(earlier) = &self.earlier {
            pages.union(earlier).map_err(MemoryError::from)?;
        }
        Ok((self.id.clone(), pages))
    }
}

/// Takes all marks out of the log, as nothing was written yet that counts.
fn clear(log: &Arc<dyn DirtyLog>, memory: &devices::GuestMemory) -> Result<(), MachineError> {
    let mut marked = PageSet::of(memory).map_err(MemoryError::from)?;
    log.peek(&mut marked).map_err(MachineError::DirtyLog)?;
    for (region, word, words) in marked.filled() {
        log.clear(region, word as u64 * 64, words)
            .map_err(MachineError::DirtyLog)?;
    }
    Ok(())
}
