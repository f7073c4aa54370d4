//! What backs a disk: a raw image file or a block device of the host.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Advice, FallocateFlags, OFlags, fadvise, fallocate, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use vm_memory::Bytes;

use super::SECTOR_SIZE;
use super::request::RequestError;
use super::sys::{self, Lock};
use crate::GuestMemory;
use crate::virtio::sys::{At, Durability};
use crate::virtio::{Buffers, HostBackend, HostError};

/// An open disk. Nothing is locked by opening it.
#[derive(Debug)]
pub struct Backend {
    file: File,
    path: PathBuf,
    is_block_device: bool,
    read_only: bool,
    sectors: u64,
    /// How often the disk was modified, and how much of that is durable.
    modified: AtomicU64,
    flushed: AtomicU64,
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
        // Requests may take their time.
        fcntl_getfl(&file)
            .and_then(|flags| fcntl_setfl(&file, flags - OFlags::NONBLOCK))
            .map_err(|errno| failed("set it up")(errno.into()))?;
        Ok(Self {
            file,
            path: owned(),
            is_block_device,
            read_only,
            sectors: size / SECTOR_SIZE,
            modified: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
        })
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

    /// The one place where every change of the disk passes: each write, discard and zeroing by whichever engine, in
    /// bytes of the disk, after it was done or failed half-way, and before the guest hears of it.
    pub(super) fn modified(&self, offset: u64, len: u64) {
        tracing::trace!(offset, len, "disk modified");
        self.modified.fetch_add(1, Ordering::SeqCst);
    }

    /// What is to be told to [`Backend::flushed`] when a flush that begins now is done; `None` if there is nothing to
    /// flush.
    pub(super) fn unflushed(&self) -> Option<u64> {
        let modified = self.modified.load(Ordering::SeqCst);
        (self.flushed.load(Ordering::SeqCst) < modified).then_some(modified)
    }

    /// A flush is done.
    pub(super) fn flushed(&self, generation: u64) {
        self.flushed.fetch_max(generation, Ordering::SeqCst);
    }

    /// Makes what was written durable.
    pub fn flush(&self) -> Result<(), BackendError> {
        if let Some(generation) = self.unflushed() {
            self.write_back()?;
            self.flushed(generation);
        }
        Ok(())
    }

    fn write_back(&self) -> Result<(), BackendError> {
        self.file.sync_data().map_err(self.failed("write it back"))
    }

    /// Gives up what `len` bytes at byte `offset` hold, and their space where the host can: it is no matter what is
    /// there afterwards, so nothing fails where it cannot.
    pub(super) fn discard(&self, offset: u64, len: u64) -> Result<(), BackendError> {
        let done = self.fallocate(FallocateFlags::PUNCH_HOLE, offset, len);
        self.modified(offset, len);
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
        self.modified(offset, len);
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
        if self.is_block_device {
            match sys::flush_buffers(&self.file) {
                // Needs a privilege; advice does without, page by page.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                done => return done.map_err(self.failed("drop its buffers")),
            }
        }
        // Only pages that are written back can be dropped, whoever wrote them.
        self.write_back()?;
        fadvise(&self.file, 0, None, Advice::DontNeed)
            .map_err(|errno| self.failed("drop its cached pages")(errno.into()))
    }

    /// Fills `into` from byte `offset` of the disk on, marking the pages.
    pub(super) fn read(&self, memory: &GuestMemory, into: &Buffers, offset: u64) -> Result<(), RequestError> {
        let mut at = self.at(offset);
        for (address, len) in into.iter() {
            memory.read_exact_volatile_from(address, &mut at, len as usize)?;
        }
        Ok(())
    }

    /// Writes what `from` holds at byte `offset` of the disk.
    pub(super) fn write(
        &self,
        memory: &GuestMemory,
        from: &Buffers,
        offset: u64,
        durability: Durability,
    ) -> Result<(), RequestError> {
        let mut at = self.at(offset);
        let done = from
            .iter()
            .try_for_each(|(address, len)| memory.write_all_volatile_to(address, &mut at, len as usize));
        self.modified(offset, from.len());
        done?;
        if durability == Durability::Durable {
            self.flush()?;
        }
        Ok(())
    }

    fn at(&self, offset: u64) -> At<'_> {
        At {
            file: &self.file,
            offset,
        }
    }

    /// What is read and written.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> BackendError + '_ {
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
