//! Disks that are made anew for a machine that brings their content along.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use devices::virtio::block::{Access, Backend, BackendError};
use migration::{BlankDisk, MachineError as PortError};
use rustix::fs::{FallocateFlags, fallocate};
use tempfile::{Builder, TempPath};

/// So many bytes are written at most before they are made durable: else the last flush, for which the guest waits,
/// might have all of a disk to write back.
const WRITE_BACK: u64 = 64 << 20;

/// A new disk, zeroed and hidden beside the name that it is to have. It goes when this does, unless it was kept.
#[derive(Debug)]
pub(super) struct Blank {
    device: u32,
    path: PathBuf,
    size: u64,
    file: File,
    /// Written since the last flush.
    unsafe_bytes: AtomicU64,
    name: Mutex<Name>,
}

#[derive(Debug)]
enum Name {
    Hidden(TempPath),
    /// It has its name, but the machine may still not come.
    Given,
    Kept,
}

/// A disk that cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("disk {}: cannot make it, with {size} bytes: {source}", path.display())]
pub struct BlankError {
    path: PathBuf,
    size: u64,
    #[source]
    source: io::Error,
}

impl Blank {
    /// Makes a disk that is to be at `path`, where nothing is, behind the device of this number.
    pub(super) fn make(device: u32, path: &Path, size: u64) -> Result<Self, BlankError> {
        let made = || {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let file = Builder::new()
                .prefix(&format!(".{name}."))
                .tempfile_in(directory(path))?;
            file.as_file().set_len(size)?;
            Ok(file.into_parts())
        };
        let (file, hidden) = made().map_err(|source| BlankError {
            path: path.to_owned(),
            size,
            source,
        })?;
        Ok(Self {
            device,
            path: path.to_owned(),
            size,
            file,
            unsafe_bytes: AtomicU64::new(0),
            name: Mutex::new(Name::Hidden(hidden)),
        })
    }

    /// The disk as the machine has it.
    pub(super) fn open(&self, access: Access) -> Result<Backend, BackendError> {
        let opened = match &*self.name() {
            Name::Hidden(hidden) => Backend::open(hidden, access)?,
            Name::Given | Name::Kept => Backend::open(&self.path, access)?,
        };
        Ok(opened.made_here(&self.path))
    }

    /// Makes all that was written durable.
    pub(super) fn flush(&self) -> Result<(), PortError> {
        self.unsafe_bytes.store(0, Ordering::Relaxed);
        self.file
            .sync_data()
            .map_err(|error| self.failed("write it back", error))
    }

    /// What [`Blank::give_name`] will cost, as far as that can be done before: what is durable now need not be made so
    /// while the guest waits.
    pub(super) fn rehearse(&self) -> Result<(), PortError> {
        self.flush()?;
        self.sync_directory()
    }

    /// Makes it durable and gives it its name, if nobody else has that by now.
    pub(super) fn give_name(&self) -> Result<(), PortError> {
        self.flush()?;
        let mut name = self.name();
        if let Name::Hidden(hidden) = std::mem::replace(&mut *name, Name::Given)
            && let Err(error) = hidden.persist_noclobber(&self.path)
        {
            *name = Name::Hidden(error.path);
            return Err(self.failed("give it its name", error.error));
        }
        self.sync_directory()
    }

    fn sync_directory(&self) -> Result<(), PortError> {
        File::open(directory(&self.path))
            .and_then(|directory| directory.sync_all())
            .map_err(|error| self.failed("make its name durable", error))
    }

    /// The machine runs with it, or may: it stays.
    pub(super) fn keep(&self) {
        *self.name() = Name::Kept;
    }

    fn name(&self) -> MutexGuard<'_, Name> {
        self.name.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, what: &str, error: impl Into<io::Error>) -> PortError {
        format!("disk {}: cannot {what}: {}", self.path.display(), error.into()).into()
    }
}

fn directory(path: &Path) -> &Path {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

impl BlankDisk for Blank {
    fn device(&self) -> u32 {
        self.device
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn write(&self, offset: u64, content: &[u8]) -> Result<(), PortError> {
        self.file
            .write_all_at(content, offset)
            .map_err(|error| self.failed("write to it", error))?;
        let len = content.len() as u64;
        if self.unsafe_bytes.fetch_add(len, Ordering::Relaxed) + len >= WRITE_BACK {
            self.flush()?;
        }
        Ok(())
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError> {
        self.file
            .read_exact_at(into, offset)
            .map_err(|error| self.failed("read it", error))
    }

    fn zero(&self, offset: u64, len: u64) -> Result<(), PortError> {
        // It lies on a file system that made it sparse.
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, offset, len).map_err(|error| self.failed("zero a part of it", error))
    }
}

impl Drop for Blank {
    fn drop(&mut self) {
        if matches!(*self.name(), Name::Given)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            let disk = self.path.display();
            tracing::warn!(%disk, %error, "a disk whose machine did not come cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        entries.map(name).collect()
    }

    #[test]
    fn a_disk_is_there_when_it_is_kept_and_not_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        for kept in [false, true] {
            let blank = Blank::make(3, &path, 8192).unwrap();
            let backend = blank.open(Access::default()).unwrap();
            assert_eq!((backend.path(), backend.size()), (path.as_path(), 8192));
            assert!(!path.exists());
            blank.write(4096, &[7; 4096]).unwrap();
            blank.zero(6144, 2048).unwrap();
            blank.give_name().unwrap();
            assert_eq!(names(directory.path()), ["disk"]);
            if kept {
                blank.keep();
            }
            drop(blank);
            assert_eq!(path.exists(), kept);
        }
        let content = fs::read(&path).unwrap();
        assert_eq!(content, [vec![0; 4096], vec![7; 2048], vec![0; 2048]].concat());
    }

    #[test]
    fn nothing_is_written_over_and_nothing_stays_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let blank = Blank::make(0, &path, 512).unwrap();
        fs::write(&path, "somebody else's").unwrap();
        let error = blank.give_name().unwrap_err().to_string();
        assert!(
            error.contains("give it its name") && error.contains("exists"),
            "{error}"
        );
        drop(blank);
        assert_eq!(names(directory.path()), ["disk"]);
        assert_eq!(fs::read(&path).unwrap(), b"somebody else's");
        let nowhere = Path::new("/nowhere/disk");
        let error = Blank::make(0, nowhere, 512).unwrap_err().to_string();
        assert!(error.contains("/nowhere/disk: cannot make it"), "{error}");
    }
}
