//! A snapshot that is being written, under a name that is not mistaken for a complete one.

use std::ffi::OsString;
use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use api::VERSION;
use devices::GuestMemory;
use migration::{MachineDescription, PageSet};
use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;
use tempfile::TempDir;

use super::blocks::{self, StoredBlocks};
use super::directory::SnapshotDirectory;
use super::manifest::{DifferenceRecord, FileRecord};
use super::{
    CHANGED, CHECKSUMS, LiveCopy, MANIFEST, MEMORY, Manifest, STATE, SnapshotError, SnapshotId, SnapshotWatch,
};

/// The hidden directory in which a snapshot is written, beside the snapshot's own name. It is removed, with everything in
/// it, when this is dropped before it was published.
#[derive(Debug)]
pub struct SnapshotDraft {
    directory: TempDir,
    /// The same directory, opened: all files are made beneath it.
    beneath: SnapshotDirectory,
    /// The path that the snapshot is to have.
    target: PathBuf,
    /// The directory in which both are.
    parent: File,
    /// The files that were written. They stay open until they are on the disk, as a file that is opened anew may not
    /// report an earlier write error.
    files: Vec<(PathBuf, File)>,
}

/// What goes into a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotContent<'a> {
    /// The snapshot's own name.
    pub id: SnapshotId,
    /// The machine, as it is described to a destination.
    pub machine: MachineDescription,
    /// The machine's saved state.
    pub state: &'a [u8],
    /// Its memory, to which nothing may write meanwhile.
    pub memory: &'a GuestMemory,
    /// All pages that may hold something, or may differ from the base's.
    pub pages: &'a PageSet,
    /// What it is to be a difference to, if it is not to be whole.
    pub base: Option<SnapshotId>,
    /// When the guest came to stand still.
    pub stopped: SystemTime,
}

/// A machine at the moment of a live snapshot, besides its memory.
#[derive(Clone, Debug)]
pub struct SavedMachine {
    /// The machine, as it is described to a destination.
    pub description: MachineDescription,
    /// Its saved state.
    pub state: Vec<u8>,
    /// When the guest came to stand still.
    pub stopped: SystemTime,
}

impl SnapshotDraft {
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
        let around = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let parent = File::open(around).map_err(SnapshotError::io(around))?;
        // Only the user of this process may read a guest's memory.
        let directory = tempfile::Builder::new()
            .prefix(&prefix)
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(around)
            .map_err(SnapshotError::io(around))?;
        Ok(Self {
            beneath: SnapshotDirectory::open(directory.path())?,
            directory,
            target: target.into(),
            parent,
            files: Vec::new(),
        })
    }

    /// Writes all files of a whole snapshot of a guest that goes on meanwhile; see [`LiveCopy`]. Calls `resume` when it may.
    /// Comes after [`SnapshotDraft::create_memory`].
    pub fn write_live(
        &mut self,
        id: SnapshotId,
        machine: SavedMachine,
        copy: LiveCopy,
        resume: impl FnOnce(),
        watch: &SnapshotWatch,
    ) -> Result<Manifest, SnapshotError> {
        let (path, file) = self.memory()?;
        let written = copy.write(resume, file, path, watch)?;
        self.finish(id, machine, &written, None)
    }

    /// Writes all files.
    pub fn write(
        &mut self,
        content: SnapshotContent<'_>,
        watch: &SnapshotWatch,
    ) -> Result<Manifest, SnapshotError> {
        self.create_memory(content.memory)?;
        let (path, file) = self.memory()?;
        let written = blocks::write(content.memory, content.pages, file, path, watch)?;
        let mut difference = None;
        if let Some(base) = content.base {
            let changed = changed(content.pages);
            self.create(CHANGED, &changed)?;
            let changed = FileRecord::of(&changed);
            difference = Some(DifferenceRecord { base, changed });
        }
        let machine = SavedMachine {
            description: content.machine,
            state: content.state.to_vec(),
            stopped: content.stopped,
        };
        self.finish(content.id, machine, &written, difference)
    }

    /// Makes the file for the memory, the first of all.
    pub fn create_memory(&mut self, memory: &GuestMemory) -> Result<(), SnapshotError> {
        let (path, file) = (self.beneath.path_of(MEMORY), self.beneath.create(MEMORY)?);
        let len = crate::memory::ranges(memory).iter().map(|(_, len)| len).sum();
        file.set_len(len).map_err(SnapshotError::io(&path))?;
        self.files.push((path, file));
        Ok(())
    }

    /// The file for the memory.
    fn memory(&self) -> Result<(&Path, &File), SnapshotError> {
        let first = self.files.first().map(|(path, file)| (path.as_path(), file));
        first.ok_or_else(|| SnapshotError::BadPath(self.target.clone()))
    }

    /// Writes the files besides memory, whose blocks are known now.
    fn finish(
        &mut self,
        id: SnapshotId,
        machine: SavedMachine,
        written: &StoredBlocks,
        difference: Option<DifferenceRecord>,
    ) -> Result<Manifest, SnapshotError> {
        let checksums: Vec<u8> = written
            .checksums
            .iter()
            .flat_map(|checksum| checksum.to_le_bytes())
            .collect();
        self.create(CHECKSUMS, &checksums)?;
        self.create(STATE, &machine.state)?;
        let stopped = machine.stopped.duration_since(SystemTime::UNIX_EPOCH);
        let manifest = Manifest {
            godwit_version: VERSION.into(),
            id,
            difference,
            stopped_unix_ns: stopped.unwrap_or_default().as_nanos() as u64,
            state: FileRecord::of(&machine.state),
            machine: machine.description,
            checksums: FileRecord::of(&checksums),
            pages: written.pages,
        };
        let text = manifest.seal().map_err(|source| SnapshotError::Manifest {
            path: self.beneath.path_of(MANIFEST),
            source,
        })?;
        self.create(MANIFEST, &text)?;
        Ok(manifest)
    }

    /// Puts the snapshot on the disk and gives it its name. After an error there is nothing of that name.
    pub fn publish(self, watch: &SnapshotWatch) -> Result<(), SnapshotError> {
        for (path, file) in &self.files {
            watch.check()?;
            file.sync_all().map_err(SnapshotError::io(path))?;
        }
        let draft = self.directory.path();
        self.beneath.sync().map_err(SnapshotError::io(draft))?;
        watch.check()?;
        self.rename(draft)?;
        if let Err(error) = self.parent.sync_all() {
            // Its old name again, so that it is removed with the draft. If even that fails, nothing more can be done.
            let _ = rustix::fs::rename(&self.target, draft);
            return Err(SnapshotError::io(&self.target)(error));
        }
        // The draft has no longer the name under which it would be removed.
        let _ = self.directory.keep();
        Ok(())
    }

    /// Gives the draft the snapshot's name, never in place of something else.
    fn rename(&self, draft: &Path) -> Result<(), SnapshotError> {
        let renamed = match rustix::fs::renameat_with(CWD, draft, CWD, &self.target, RenameFlags::NOREPLACE) {
            // Some file systems, NFS for one, cannot be asked for that. A directory without flags replaces an empty
            // directory at most.
            Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::rename(draft, &self.target),
            renamed => renamed,
        };
        renamed.map_err(|error| match error {
            Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR => SnapshotError::Exists(self.target.clone()),
            other => SnapshotError::io(&self.target)(other.into()),
        })
    }

    /// Writes a file as a whole.
    fn create(&mut self, name: &str, content: &[u8]) -> Result<(), SnapshotError> {
        let (path, mut file) = (self.beneath.path_of(name), self.beneath.create(name)?);
        file.write_all(content).map_err(SnapshotError::io(&path))?;
        self.files.push((path, file));
        Ok(())
    }
}

/// The file that says which pages a difference has.
fn changed(pages: &PageSet) -> Vec<u8> {
    let bytes = |range: migration::MemoryRange| [range.gpa.to_le_bytes(), range.len.to_le_bytes()];
    pages.ranges(u64::MAX).flat_map(bytes).flatten().collect()
}
