//! Disks that are made anew for a machine that brings their content along.
//!
//! A new disk must not replace a file, and must not stay behind unless the machine has come.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use devices::virtio::block::{Access, BlockBackend, BlockBackendError};
use migration::{BlankDisk, PortError};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use tempfile::{Builder, TempPath};

/// The most bytes that are written before they are made durable: otherwise the last flush, for which the guest waits,
/// might have to write back all of a disk.
const MAX_UNFLUSHED: u64 = 64 << 20;

/// What is written where a file system has no holes.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A new disk, zeroed and hidden beside the name that it is to have. It is removed when this is dropped, unless it was
/// kept.
#[derive(Debug)]
pub(super) struct Blank {
    device: u32,
    path: PathBuf,
    size: u64,
    file: File,
    /// Bytes that were written since the last flush.
    unflushed: AtomicU64,
    name: Mutex<DiskName>,
}

/// The disk's name in the file system.
#[derive(Debug)]
enum DiskName {
    /// A hidden one, which is removed with the value.
    Hidden(TempPath),
    /// Its own, but the machine may still not come.
    Given,
    /// Its own for good: the machine runs with it, or may.
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
            unflushed: AtomicU64::new(0),
            name: Mutex::new(DiskName::Hidden(hidden)),
        })
    }

    /// The disk as the machine has it.
    pub(super) fn open(&self, access: Access) -> Result<BlockBackend, BlockBackendError> {
        let opened = match &*self.name() {
            DiskName::Hidden(hidden) => BlockBackend::open(hidden, access)?,
            DiskName::Given | DiskName::Kept => BlockBackend::open(&self.path, access)?,
        };
        Ok(opened.made_here(&self.path))
    }

    /// Makes all that was written durable.
    pub(super) fn flush(&self) -> Result<(), PortError> {
        self.unflushed.store(0, Ordering::Relaxed);
        self.file
            .sync_data()
            .map_err(|error| self.failed("write it back", error))
    }

    /// Does as much of [`Blank::publish`] as can be done before it, which takes about as long: what is durable now need not
    /// be made durable while the guest waits.
    pub(super) fn rehearse(&self) -> Result<(), PortError> {
        self.flush()?;
        self.sync_directory()
    }

    /// Makes the disk durable and gives it its name, unless another file has that by now.
    pub(super) fn publish(&self) -> Result<(), PortError> {
        self.flush()?;
        let mut name = self.name();
        if let DiskName::Hidden(hidden) = std::mem::replace(&mut *name, DiskName::Given)
            && let Err(error) = hidden.persist_noclobber(&self.path)
        {
            *name = DiskName::Hidden(error.path);
            return Err(self.failed("give it its name", error.error));
        }
        self.sync_directory()
    }

    /// Writes zeroes, where the file system has no holes.
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let part = (end - at).min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..part as usize], at)?;
            at += part;
        }
        Ok(())
    }

    /// Removes the disk, unless another file has its name by now. Nothing may use the disk any more.
    pub(super) fn remove(&self) {
        let is_ours = || {
            let (ours, found) = (self.file.metadata()?, fs::symlink_metadata(&self.path)?);
            Ok((ours.dev(), ours.ino()) == (found.dev(), found.ino()))
        };
        let removed = match is_ours() {
            Ok(true) => fs::remove_file(&self.path),
            Ok(false) => Err(io::Error::other("another file has its name by now")),
            Err(error) => Err(error),
        };
        let disk = self.path.display();
        match removed {
            Ok(()) => {
                tracing::info!(%disk, "a disk that was made for a machine that did not come is removed")
            }
            Err(error) => {
                tracing::warn!(%disk, %error, "a disk that was made for a machine that did not come stays behind");
            }
        }
    }

    fn sync_directory(&self) -> Result<(), PortError> {
        File::open(directory(&self.path))
            .and_then(|directory| directory.sync_all())
            .map_err(|error| self.failed("make its name durable", error))
    }

    /// Keeps the disk for good: the machine runs with it, or may.
    pub(super) fn keep(&self) {
        *self.name() = DiskName::Kept;
    }

    fn name(&self) -> MutexGuard<'_, DiskName> {
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
        if self.unflushed.fetch_add(len, Ordering::Relaxed) + len >= MAX_UNFLUSHED {
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
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let done = match fallocate(&self.file, flags, offset, len) {
            // Some file systems have no holes: NFS before 4.2, vfat.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.write_zeroes(offset, len),
            done => done.map_err(io::Error::from),
        };
        done.map_err(|error| self.failed("zero a part of it", error))
    }
}

impl Drop for Blank {
    fn drop(&mut self) {
        if matches!(*self.name(), DiskName::Given) {
            self.remove();
        }
    }
}

#[cfg(test)]
mod tests {
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
            blank.publish().unwrap();
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
    fn what_another_has_put_in_its_place_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let blank = Blank::make(0, &path, 512).unwrap();
        blank.publish().unwrap();
        fs::write(directory.path().join("other"), "another's").unwrap();
        fs::rename(directory.path().join("other"), &path).unwrap();
        drop(blank);
        assert_eq!(fs::read(&path).unwrap(), b"another's");
    }

    #[test]
    fn a_disk_that_is_kept_goes_on_demand() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let blank = Blank::make(0, &path, 512).unwrap();
        blank.publish().unwrap();
        blank.keep();
        blank.remove();
        drop(blank);
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn zeroes_where_there_are_no_holes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let len = 3 * ZEROES.len() as u64;
        let blank = Blank::make(0, &path, len).unwrap();
        blank.write(0, &vec![7; len as usize]).unwrap();
        blank.write_zeroes(100, len - 300).unwrap();
        blank.publish().unwrap();
        let content = fs::read(&path).unwrap();
        let expected = [vec![7; 100], vec![0; (len - 300) as usize], vec![7; 200]].concat();
        assert!(content == expected);
    }

    #[test]
    fn nothing_is_written_over_and_nothing_stays_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let blank = Blank::make(0, &path, 512).unwrap();
        fs::write(&path, "another's").unwrap();
        let error = blank.publish().unwrap_err().to_string();
        assert!(
            error.contains("give it its name") && error.contains("exists"),
            "{error}"
        );
        drop(blank);
        assert_eq!(names(directory.path()), ["disk"]);
        assert_eq!(fs::read(&path).unwrap(), b"another's");
        let nowhere = Path::new("/nowhere/disk");
        let error = Blank::make(0, nowhere, 512).unwrap_err().to_string();
        assert!(error.contains("/nowhere/disk: cannot make it"), "{error}");
    }
}
