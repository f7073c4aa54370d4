//! What backs a disk: a raw image file or a block device of the host.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate, seek};
use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::SECTOR_SIZE;
use super::log::{BlockLog, Logging};
use super::sys::{self, Lock};
use crate::GuestMemory;
use crate::virtio::sys::At;
use crate::virtio::{HostBackend, HostError};

/// An open disk. Nothing is locked by opening it.
#[derive(Debug)]
pub struct Backend {
    file: File,
    path: PathBuf,
    is_block_device: bool,
    read_only: bool,
    sectors: u64,
    /// Nobody else has written to it, so that nothing that is cached of it is out of date.
    made_here: bool,
    logging: Logging,
}

/// Why a disk cannot be used. Every message is one line that names the path.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// Nothing is there.
    #[error("disk {}: expected a file or a block device, found nothing there", path.display())]
    Missing {
        /// The disk.
        path: PathBuf,
    },
    /// Something else than a disk is there.
    #[error("disk {}: expected a file or a block device, got {got}", path.display())]
    NotADisk {
        /// The disk.
        path: PathBuf,
        /// What it is.
        got: &'static str,
    },
    /// The process may not open it like this.
    #[error("disk {}: no permission to open it {}", path.display(), mode(*read_only))]
    Permission {
        /// The disk.
        path: PathBuf,
        /// Whether it was to be read only.
        read_only: bool,
    },
    /// It has no whole number of sectors, or none.
    #[error("disk {}: expected a size that is a positive multiple of {SECTOR_SIZE} bytes, got {got}", path.display())]
    Size {
        /// The disk.
        path: PathBuf,
        /// Its size in bytes.
        got: u64,
    },
    /// Somebody else has it locked.
    #[error("disk {}: expected {} lock, but another process has it locked", path.display(), lock(*read_only))]
    Locked {
        /// The disk.
        path: PathBuf,
        /// Whether a shared lock was asked for.
        read_only: bool,
    },
    /// A system call failed.
    #[error("disk {}: cannot {what}: {source}", path.display())]
    Io {
        /// The disk.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn mode(read_only: bool) -> &'static str {
    if read_only {
        "for reading"
    } else {
        "for reading and writing"
    }
}

fn lock(read_only: bool) -> &'static str {
    if read_only { "a shared" } else { "an exclusive" }
}

impl Backend {
    /// Opens the disk at `path`.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, BackendError> {
        let owned = || path.to_owned();
        let failed = |what| {
            move |source| BackendError::Io {
                path: owned(),
                what,
                source,
            }
        };
        // Without O_NONBLOCK a FIFO would block before it could be refused.
        let opened = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path);
        let mut file = opened.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => BackendError::Missing { path: owned() },
            io::ErrorKind::IsADirectory => BackendError::NotADisk {
                path: owned(),
                got: "a directory",
            },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => BackendError::Permission {
                path: owned(),
                read_only,
            },
            _ => BackendError::Io {
                path: owned(),
                what: "open it",
                source,
            },
        })?;
        let kind = file.metadata().map_err(failed("look at it"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let got = if kind.is_dir() {
                "a directory"
            } else {
                "something else"
            };
            return Err(BackendError::NotADisk { path: owned(), got });
        }
        // A block device's metadata says 0; its end says the truth.
        let size = file.seek(SeekFrom::End(0)).map_err(failed("find its size"))?;
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return Err(BackendError::Size {
                path: owned(),
                got: size,
            });
        }
        let is_block_device = kind.is_block_device();
        Ok(Self {
            file,
            path: owned(),
            is_block_device,
            read_only,
            sectors: size / SECTOR_SIZE,
            made_here: false,
            logging: Logging::default(),
        })
    }

    /// The same disk, which was made on this host, and whose name is, or will be, `path`.
    pub fn made_here(self, path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            made_here: true,
            ..self
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the guest may only read.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Size in sectors of [`SECTOR_SIZE`] bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.sectors * SECTOR_SIZE
    }

    /// Locks the disk against other users: exclusively, or shared if it is read-only. The lock belongs to this
    /// open disk, not to the process, and ends with it.
    pub fn lock(&self) -> Result<(), BackendError> {
        let kind = if self.read_only {
            Lock::Shared
        } else {
            Lock::Exclusive
        };
        match sys::set_lock(&self.file, kind).map_err(self.failed("lock it"))? {
            true => Ok(()),
            false => Err(BackendError::Locked {
                path: self.path.clone(),
                read_only: self.read_only,
            }),
        }
    }

    /// Gives the lock up.
    pub fn unlock(&self) -> Result<(), BackendError> {
        sys::set_lock(&self.file, Lock::Unlocked)
            .map(drop)
            .map_err(self.failed("unlock it"))
    }

    /// Logs from now on what is written to it. Any log before that ends.
    pub fn start_log(&self) -> Arc<BlockLog> {
        self.logging.start(self.size())
    }

    /// Ends the log.
    pub fn stop_log(&self) {
        self.logging.stop();
    }

    /// Ranges of bytes that may hold something, as offset and length; all else is zero.
    pub fn allocated(&self) -> Result<Vec<(u64, u64)>, BackendError> {
        let (size, mut at) = (self.size(), 0);
        let mut ranges = Vec::new();
        while at < size {
            let data = match seek(&self.file, rustix::fs::SeekFrom::Data(at)) {
                Ok(data) => data.min(size),
                // Nothing but a hole from here on.
                Err(Errno::NXIO) => break,
                // A file system, or a device, that knows of no holes.
                Err(Errno::INVAL) => at,
                Err(errno) => return Err(self.failed("look for holes in it")(errno.into())),
            };
            let hole = seek(&self.file, rustix::fs::SeekFrom::Hole(data)).map_or(size, |hole| hole.min(size));
            if hole > data {
                ranges.push((data, hole - data));
            }
            at = hole.max(data + 1);
        }
        Ok(ranges)
    }

    /// Reads what is at byte `offset` of the disk.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), BackendError> {
        self.file
            .read_exact_at(into, offset)
            .map_err(self.failed("read it"))
    }

    /// Makes what was written durable.
    pub fn flush(&self) -> Result<(), BackendError> {
        self.file.sync_data().map_err(self.failed("write it back"))
    }

    /// Gives up what `len` bytes at byte `offset` hold, and their space where the host can: it is no matter what is
    /// there afterwards, so nothing fails where it cannot.
    pub(super) fn discard(&self, offset: u64, len: u64) -> Result<(), BackendError> {
        let done = self.fallocate(FallocateFlags::PUNCH_HOLE, offset, len);
        self.logging.written(offset, len);
        match done {
            // Not at all, or not such small parts of it.
            Err(Errno::OPNOTSUPP | Errno::INVAL) => Ok(()),
            done => done.map_err(|errno| self.failed("discard a part of it")(errno.into())),
        }
    }

    /// Makes `len` bytes at byte `offset` zero; they may give up their space if `unmap`.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), BackendError> {
        let flags = if unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        let done = match self.fallocate(flags, offset, len) {
            Err(Errno::OPNOTSUPP | Errno::INVAL) => self.zero(offset, len),
            done => done.map_err(io::Error::from),
        };
        self.logging.written(offset, len);
        done.map_err(self.failed("zero a part of it"))
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
        if len == 0 {
            return Ok(());
        }
        fallocate(&self.file, flags | FallocateFlags::KEEP_SIZE, offset, len)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroes = [0; 64 << 10];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(zeroes.len() as u64);
            self.file.write_all_at(&zeroes[..part as usize], offset + done)?;
            done += part;
        }
        Ok(())
    }

    /// Drops what this host has cached of the disk, so that what another host wrote is read from the disk.
    pub fn invalidate(&self) -> Result<(), BackendError> {
        if self.made_here {
            return Ok(());
        }
        if self.is_block_device {
            match sys::flush_buffers(&self.file) {
                // Needs a privilege; advice does without, page by page.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                done => return done.map_err(self.failed("drop its buffers")),
            }
        }
        // Only pages that are written back can be dropped.
        self.flush()?;
        fadvise(&self.file, 0, None, Advice::DontNeed)
            .map_err(|errno| self.failed("drop its cached pages")(errno.into()))
    }

    /// Reads `len` bytes at byte `offset` of the disk into guest memory, marking the pages.
    pub(super) fn read(
        &self,
        memory: &GuestMemory,
        address: GuestAddress,
        len: u32,
        offset: u64,
    ) -> Result<(), GuestMemoryError> {
        memory.read_exact_volatile_from(
            address,
            &mut At {
                file: &self.file,
                offset,
            },
            len as usize,
        )
    }

    /// Writes `len` bytes of guest memory at byte `offset` of the disk.
    pub(super) fn write(
        &self,
        memory: &GuestMemory,
        address: GuestAddress,
        len: u32,
        offset: u64,
    ) -> Result<(), GuestMemoryError> {
        let written = memory.write_all_volatile_to(
            address,
            &mut At {
                file: &self.file,
                offset,
            },
            len as usize,
        );
        // A part of it may have been, also where it failed.
        self.logging.written(offset, len.into());
        written
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> BackendError + '_ {
        move |source| BackendError::Io {
            path: self.path.clone(),
            what,
            source,
        }
    }
}

impl HostBackend for Backend {
    fn take_locks(&self) -> Result<(), HostError> {
        Ok(self.lock()?)
    }

    fn release_locks(&self) -> Result<(), HostError> {
        Ok(self.unlock()?)
    }

    fn flush(&self) -> Result<(), HostError> {
        Ok(Self::flush(self)?)
    }

    fn invalidate(&self) -> Result<(), HostError> {
        Ok(Self::invalidate(self)?)
    }
}
