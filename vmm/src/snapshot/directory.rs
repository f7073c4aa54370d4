//! A snapshot's directory. Its files are opened and made beneath one descriptor, and no link in it is followed:
//! otherwise a user who may write to the directory could have a machine start from another user's memory.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open, openat};
use rustix::io::Errno;

use super::SnapshotError;

/// An open directory, whatever becomes of its name.
#[derive(Debug)]
pub(super) struct SnapshotDirectory {
    descriptor: OwnedFd,
    path: PathBuf,
}

impl SnapshotDirectory {
    /// Opens the directory at `path`, which the operator names and which may be a link.
    pub(super) fn open(path: &Path) -> Result<Self, SnapshotError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptor =
            open(path, flags, Mode::empty()).map_err(|error| SnapshotError::io(path)(error.into()))?;
        Ok(Self {
            descriptor,
            path: path.into(),
        })
    }

    /// The path at which it was opened.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A file's path, to name it in an error.
    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Opens a file of it for reading. Anything but a regular file is refused, and not waited for, as a FIFO would be.
    pub(super) fn file(&self, name: &str) -> Result<File, SnapshotError> {
        let path = self.path_of(name);
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat(&self.descriptor, name, flags, Mode::empty()) {
            Ok(descriptor) => File::from(descriptor),
            Err(Errno::LOOP) => return Err(SnapshotError::NoFile(path)),
            Err(error) => return Err(SnapshotError::io(&path)(error.into())),
        };
        if file.metadata().map_err(SnapshotError::io(&path))?.is_file() {
            return Ok(file);
        }
        Err(SnapshotError::NoFile(path))
    }

    /// Makes a file in it, which must not exist, for writing. Only the file's owner may read it, as it may hold guest
    /// memory.
    pub(super) fn create(&self, name: &str) -> Result<File, SnapshotError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = openat(&self.descriptor, name, flags, Mode::RUSR | Mode::WUSR);
        made.map(File::from)
            .map_err(|error| SnapshotError::io(&self.path_of(name))(error.into()))
    }

    /// Puts the names of its files on the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.descriptor)?)
    }
}
