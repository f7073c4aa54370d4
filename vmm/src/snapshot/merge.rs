//! A snapshot and differences to it, one on top of the other, become one whole snapshot.

use std::path::Path;

use migration::{MemoryKind, PageSet};

use super::{
    Manifest, Snapshot, SnapshotContent, SnapshotDifference, SnapshotDraft, SnapshotError, SnapshotWatch,
};
use crate::memory;

/// Writes what `base` is with the `differences`, in that order, as the snapshot `target`: it has the name of the last
/// one, so that later differences to that one fit it as well. Takes as much memory as the guest had.
pub fn merge(
    base: &Snapshot,
    differences: &[SnapshotDifference],
    target: &Path,
    watch: &SnapshotWatch,
) -> Result<Manifest, SnapshotError> {
    check_order(base, differences)?;
    let Some(last) = differences.last() else {
        return Err(SnapshotError::NothingToMerge);
    };
    memory::check_size(base.machine().memory.iter().map(|region| region.len).sum())?;
    let mut draft = SnapshotDraft::begin(target)?;
    let memory = base.read(MemoryKind::Anonymous, watch)?;
    for difference in differences {
        difference.apply(&memory, watch)?;
    }
    let mut populated = PageSet::of(&memory).map_err(memory::MemoryError::from)?;
    memory::populated(&memory, &[], &mut populated)?;
    let content = SnapshotContent {
        id: last.files().manifest.id.clone(),
        machine: last.files().manifest.machine.clone(),
        state: &last.files().state,
        memory: &memory,
        pages: &populated,
        base: None,
        stopped: last.files().stopped(),
    };
    let manifest = draft.write(content, watch)?;
    draft.publish(watch)?;
    Ok(manifest)
}

/// Each must be a difference to the one before it, of a machine with the same memory.
fn check_order(base: &Snapshot, differences: &[SnapshotDifference]) -> Result<(), SnapshotError> {
    let mut before = base.id();
    for difference in differences {
        let files = difference.files();
        let path = || files.path().to_owned();
        if difference.base() != before {
            return Err(SnapshotError::OtherBase {
                path: path(),
                expected: difference.base().clone(),
                got: before.clone(),
            });
        }
        if files.manifest.machine.memory != base.machine().memory {
            return Err(SnapshotError::OtherMemory(path()));
        }
        before = &files.manifest.id;
    }
    Ok(())
}
