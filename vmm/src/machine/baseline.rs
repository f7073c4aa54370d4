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

use migration::{DirtyLog, PageSet};

use super::{Machine, MachineError};
use crate::memory::{self, MemoryError};
use crate::snapshot::SnapshotId;

/// The last snapshot, and what is known about the time since.
pub(super) struct Baseline {
    id: SnapshotId,
    written: Written,
    /// Pages that were written before the log began, where a snapshot in between came to nothing.
    earlier: Option<PageSet>,
}

/// How pages that were written are known.
enum Written {
    /// Memory is mapped from the snapshot's file; what was written is this process's own.
    PrivateCopies,
    /// KVM and the devices log it.
    Log(Arc<dyn DirtyLog>),
}

/// What was before a snapshot that is not on the disk yet; see [`Machine::track`].
pub struct Before {
    previous: Option<(SnapshotId, PageSet)>,
}

impl Machine {
    /// Its memory is the private mapping of that snapshot's file, to which nobody has written yet.
    pub(super) fn based_on(&self, id: &SnapshotId) {
        *self.baseline() = Some(Baseline {
            id: id.clone(),
            written: Written::PrivateCopies,
            earlier: None,
        });
    }

    /// What a difference would be to. Fails where there is nothing.
    pub fn base(&self) -> Result<SnapshotId, MachineError> {
        let baseline = self.baseline();
        let baseline = baseline.as_ref().ok_or(MachineError::NoBase)?;
        Ok(baseline.id.clone())
    }

    /// The pages that may have been written since the last snapshot. Of a machine that stands still.
    pub(super) fn written(&self) -> Result<PageSet, MachineError> {
        let baseline = self.baseline();
        baseline.as_ref().ok_or(MachineError::NoBase)?.pages(&self.memory)
    }

    /// Logs from now on what is written after the snapshot `id`. Of a machine that stands still, whose memory is in
    /// that snapshot. If the snapshot comes to nothing, what is returned takes it back.
    pub(super) fn track(&self, id: &SnapshotId) -> Result<Before, MachineError> {
        let mut baseline = self.baseline();
        let before = match &*baseline {
            Some(before) => Some((before.id.clone(), before.pages(&self.memory)?)),
            None => None,
        };
        let log = match baseline.take() {
            Some(Baseline {
                written: Written::Log(log),
                ..
            }) => log,
            _ => self.turn_dirty_log_on()?,
        };
        match clear(&log, &self.memory) {
            Ok(()) => {
                *baseline = Some(Baseline {
                    id: id.clone(),
                    written: Written::Log(log),
                    earlier: None,
                });
                Ok(Before { previous: before })
            }
            Err(error) => {
                drop(baseline);
                self.turn_dirty_log_off()?;
                Err(error)
            }
        }
    }

    /// The snapshot that [`Machine::track`] was about is not there: the next difference is to the one before it.
    pub fn untrack(&self, before: Before) {
        let mut baseline = self.baseline();
        let Some(now) = baseline.take() else { return };
        match before.previous {
            Some((id, earlier)) => {
                *baseline = Some(Baseline {
                    id,
                    earlier: Some(earlier),
                    ..now
                });
            }
            None => {
                drop(baseline);
                if let Err(error) = self.turn_dirty_log_off() {
                    tracing::warn!(%error, "dirty logging stays on");
                }
            }
        }
    }

    /// A migration wants the log for itself.
    pub(super) fn release_log(&self) -> Result<(), MachineError> {
        let mut baseline = self.baseline();
        if matches!(
            &*baseline,
            Some(Baseline {
                written: Written::Log(_),
                ..
            })
        ) {
            *baseline = None;
            drop(baseline);
            self.turn_dirty_log_off()?;
        }
        Ok(())
    }

    fn baseline(&self) -> MutexGuard<'_, Option<Baseline>> {
        self.baseline.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Baseline {
    fn pages(&self, memory: &devices::GuestMemory) -> Result<PageSet, MachineError> {
        let mut pages = PageSet::of(memory).map_err(MemoryError::from)?;
        match &self.written {
            Written::PrivateCopies => memory::private_copies(memory, &mut pages)?,
            Written::Log(log) => log.peek(&mut pages).map_err(MachineError::DirtyLog)?,
        }
        if let Some(earlier) = &self.earlier {
            pages.union(earlier).map_err(MemoryError::from)?;
        }
        Ok(pages)
    }
}

/// Takes all marks out of the log, as nothing was written yet that counts.
fn clear(log: &Arc<dyn DirtyLog>, memory: &devices::GuestMemory) -> Result<(), MachineError> {
    let mut marked = PageSet::of(memory).map_err(MemoryError::from)?;
    log.peek(&mut marked).map_err(MachineError::DirtyLog)?;
    for region in 0.. {
        let Some(words) = marked.region_words(region) else {
            return Ok(());
        };
        log.clear(region, 0, words).map_err(MachineError::DirtyLog)?;
    }
    Ok(())
}
