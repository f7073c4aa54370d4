//! A snapshot that is being written, under a name that nobody takes for one.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use devices::GuestMemory;
use migration::{MachineDescription, PageSet};
use rustix::fs::{CWD, RenameFlags};
use tempfile::TempDir;

use super::blocks;
use super::manifest::FileRecord;
use super::{CHECKSUMS, MANIFEST, MEMORY, Manifest, STATE, SnapshotError, Watch};
use crate::VERSION;

/// The directory beside the snapshot's own. Dropped, it is removed with everything in it.
#[derive(Debug)]
pub struct Draft {
    directory: TempDir,
    target: PathBuf,
}

impl Draft {
    /// Begins what will be the directory `target`, which must not exist; the one around it must.
    pub fn begin(target: &Path) -> Result<Self, SnapshotError> {
        let name = target
            .file_name()
            .ok_or_else(|| SnapshotError::BadPath(target.into()))?;
        if target.symlink_metadata().is_ok() {
            return Err(SnapshotError::Exists(target.into()));
        }
        let mut prefix = OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let parent = parent(target);
        // Its mode is 0700: what a guest has in memory is nobody else's business.
        let directory = tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir_in(parent)
            .map_err(SnapshotError::io(parent))?;
        Ok(Self {
            directory,
            target: target.into(),
        })
    }

    /// Writes all files. Nothing may write to `memory` meanwhile, of which `populated` has all pages that may
    /// hold something.
    pub fn write(
        &self,
        machine: MachineDescription,
        state: &[u8],
        memory: &GuestMemory,
        populated: &PageSet,
        watch: &Watch,
    ) -> Result<Manifest, SnapshotError> {
        let path = self.path(MEMORY);
        let file = File::create_new(&path).map_err(SnapshotError::io(&path))?;
        let len = blocks::file_len(&machine.memory).unwrap_or(0);
        file.set_len(len).map_err(SnapshotError::io(&path))?;
        let contents = blocks::write(memory, populated, &path, watch)?;
        let checksums: Vec<u8> = contents
            .checksums
            .iter()
            .flat_map(|checksum| checksum.to_le_bytes())
            .collect();
        self.create(CHECKSUMS, &checksums)?;
        self.create(STATE, state)?;
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let manifest = Manifest {
            godwit_version: VERSION.into(),
            created_unix_ms: now.as_millis() as u64,
            machine,
            state: FileRecord::of(state),
            checksums: FileRecord::of(&checksums),
            pages: contents.pages,
        };
        let path = self.path(MANIFEST);
        let text = manifest.seal().map_err(|source| SnapshotError::Manifest {
            path: path.clone(),
            source,
        })?;
        self.create(MANIFEST, &text)?;
        Ok(manifest)
    }

    /// Puts it on the disk and gives it its name.
    pub fn publish(self) -> Result<(), SnapshotError> {
        for name in [MEMORY, CHECKSUMS, STATE, MANIFEST] {
            synchronise(&self.path(name))?;
        }
        synchronise(self.directory.path())?;
        let from = self.directory.path();
        rustix::fs::renameat_with(CWD, from, CWD, &self.target, RenameFlags::NOREPLACE).map_err(|error| {
            match error {
                rustix::io::Errno::EXIST => SnapshotError::Exists(self.target.clone()),
                other => SnapshotError::io(&self.target)(other.into()),
            }
        })?;
        // There is nothing of that name any more to remove.
        let _ = self.directory.keep();
        synchronise(parent(&self.target))
    }

    fn create(&self, name: &str, content: &[u8]) -> Result<(), SnapshotError> {
        let path = self.path(name);
        let write = || File::create_new(&path)?.write_all(content);
        write().map_err(SnapshotError::io(&path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

fn parent(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// fsync(2) of a file or a directory.
fn synchronise(path: &Path) -> Result<(), SnapshotError> {
    let sync = || File::open(path)?.sync_all();
    sync().map_err(SnapshotError::io(path))
}
