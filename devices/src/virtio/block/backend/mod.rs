//! A disk's backend: an image file or a block device of the host.

mod flush;
mod lock;
mod mirror;
mod open;
mod qcow2;
mod removed;
mod scratch;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use vm_memory::Bytes;

use super::SECTOR_SIZE;
use super::error::{BlockBackendError, BlockRequestError};
use super::log::CurrentBlockLog;
use super::sys;
use crate::GuestMemory;
use crate::virtio::sys::{Durability, FilePosition};
use crate::virtio::{Buffers, HostBackend, HostError};

use lock::HeldLocks;
pub use open::{Access, BackingFile, ImageFormat, ImageFormatError};
use open::{Alignment, open_disk};
use qcow2::Qcow2;
use scratch::Scratch;

/// An open disk. Nothing is locked by opening it.
#[derive(Debug)]
pub struct BlockBackend {
    file: File,
    path: PathBuf,
    is_block_device: bool,
    read_only: bool,
    /// The alignment for direct I/O, if the disk is opened for that.
    alignment: Option<Alignment>,
    /// The image in the file, if the file is not a raw disk.
    qcow2: Option<Qcow2>,
    sectors: AtomicU64,
    /// Bytes beyond the last whole block; 0 once the log has a line about them.
    tail: AtomicU64,
    /// Whether it was made on this host, and no other host has written to it: the host's cache is up to date.
    made_here: bool,
    /// Whether it is taken over from another process, which has it locked until then.
    is_taken_over: bool,
    /// The locks that this process holds on the files.
    held: Mutex<HeldLocks>,
    block_log: CurrentBlockLog,
    /// How often the disk was modified.
    modified: AtomicU64,
    /// Up to which modification the disk is in its file.
    written_out: AtomicU64,
    /// Up to which modification the disk is durable.
    flushed: AtomicU64,
    /// Whether a flush has failed of which the guest does not know: its own next flush might succeed.
    flush_failed: AtomicBool,
}

impl BlockBackend {
    /// Opens the disk at `path`.
    pub fn open(path: &Path, access: Access) -> Result<Self, BlockBackendError> {
        Self::open_on(path, access, &[])
    }

    /// Opens the image at `path` on these backing files, from the upper to the lower.
    pub fn open_on(path: &Path, access: Access, backing: &[BackingFile]) -> Result<Self, BlockBackendError> {
        let (file, is_block_device) = open_disk(path, access)?;
        let alignment = access.direct.then(|| Alignment::of(&file));
        let qcow2 = match (access.format, backing) {
            (ImageFormat::Raw, []) => None,
            (ImageFormat::Raw, [BackingFile { path: got, .. }, ..]) => {
                let (path, got) = (path.to_owned(), got.clone());
                return Err(BlockBackendError::NoImage { path, got });
            }
            (ImageFormat::Qcow2, backing) => Some(Qcow2::open(&file, path, access.read_only, backing)?),
        };
        let backend = Self {
            file,
            path: path.to_owned(),
            is_block_device,
            read_only: access.read_only,
            alignment,
            qcow2,
            sectors: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            made_here: false,
            is_taken_over: false,
            held: Mutex::default(),
            block_log: CurrentBlockLog::default(),
            modified: AtomicU64::new(0),
            written_out: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            flush_failed: AtomicBool::new(false),
        };
        backend.measure()?;
        Ok(backend)
    }

    /// The same disk, which was made on this host and whose name is, or will be, `path`.
    pub fn made_here(self, path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            made_here: true,
            ..self
        }
    }

    /// Reads the disk's size. The guest cannot reach what is beyond the last whole block.
    pub(super) fn measure(&self) -> Result<(), BlockBackendError> {
        let size = match &self.qcow2 {
            Some(image) => image.size(),
            None => self.file_size()?,
        };
        let tail = size % u64::from(self.block_size());
        self.sectors.store((size - tail) / SECTOR_SIZE, Ordering::SeqCst);
        self.tail.store(tail, Ordering::SeqCst);
        Ok(())
    }

    /// Logs, once, that the guest does not see the disk's end.
    pub(super) fn warn_hidden_tail(&self) {
        let tail = self.tail.swap(0, Ordering::SeqCst);
        if tail > 0 {
            let (disk, unit) = (self.path.display(), self.block_size());
            tracing::warn!(%disk, "the size is no multiple of {unit}: its last {tail} bytes are hidden from the guest");
        }
    }

    /// Seeks to the end, as the metadata of a block device have size 0.
    fn file_size(&self) -> Result<u64, BlockBackendError> {
        (&self.file)
            .seek(SeekFrom::End(0))
            .map_err(self.failed("find its size"))
    }

    /// The disk's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the guest may only read.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Size in sectors of [`SECTOR_SIZE`] bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::SeqCst)
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.sectors() * SECTOR_SIZE
    }

    /// The unit of requests' offsets and lengths, in bytes.
    pub(super) fn block_size(&self) -> u32 {
        self.alignment
            .map_or(SECTOR_SIZE as u32, |alignment| alignment.offset)
    }

    /// Discards `len` bytes at byte `offset`, and gives up their space if the host can. Their content afterwards does
    /// not matter, so it is no error if the host cannot.
    pub(super) fn discard(&self, offset: u64, len: u64) -> Result<(), BlockBackendError> {
        let done = match &self.qcow2 {
            Some(image) => image.discard(offset, len),
            None => self.fallocate(FallocateFlags::PUNCH_HOLE, offset, len),
        };
        self.modified(offset, len);
        match done {
            // The host cannot discard, or not such small parts.
            Err(error) if is_unsupported(&error) => Ok(()),
            done => done.map_err(self.failed("discard a part of it")),
        }
    }

    /// Makes `len` bytes at byte `offset` zero; their space may be given up if `unmap`.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), BlockBackendError> {
        let done = match &self.qcow2 {
            Some(image) => image.write_zeroes(offset, len, unmap),
            None if unmap => self.fallocate(FallocateFlags::PUNCH_HOLE, offset, len),
            None => self.fallocate(FallocateFlags::ZERO_RANGE, offset, len),
        };
        let done = match done {
            Err(error) if is_unsupported(&error) => self.zero(offset, len),
            done => done,
        };
        self.modified(offset, len);
        done.map_err(self.failed("zero a part of it"))
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        if len > 0 {
            fallocate(&self.file, flags | FallocateFlags::KEEP_SIZE, offset, len)?;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut zeroes = Scratch::new(len);
        let mut done = 0;
        while done < len {
            let part = zeroes.part(len - done);
            self.write_bytes(part, offset + done)?;
            done += part.len() as u64;
        }
        Ok(())
    }

    /// Drops what this host has cached of the disk, so that another host's writes are read from the disk.
    pub fn invalidate(&self) -> Result<(), BlockBackendError> {
        if self.made_here {
            return Ok(());
        }
        self.drop_cached_pages()?;
        match &self.qcow2 {
            Some(image) => image.reopen().map_err(self.failed("open it as qcow2")),
            None => Ok(()),
        }
    }

    fn drop_cached_pages(&self) -> Result<(), BlockBackendError> {
        if self.is_block_device {
            match sys::flush_buffers(&self.file) {
                // The call needs a privilege; the advice below does not.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                done => return done.map_err(self.failed("drop its buffers")),
            }
        }
        // Only pages that are written back can be dropped, whichever process wrote them.
        self.file.sync_data().map_err(self.failed("write it back"))?;
        fadvise(&self.file, 0, None, Advice::DontNeed)
            .map_err(|errno| self.failed("drop its cached pages")(errno.into()))
    }

    /// Whether the kernel can move data between the disk and these buffers where they are.
    pub(super) fn can_transfer_directly(&self, buffers: &Buffers) -> bool {
        let fits = |alignment: Alignment| buffers.are_aligned(alignment.memory);
        self.raw_file().is_some() && self.alignment.is_none_or(fits)
    }

    /// Fills `into` from byte `offset` of the disk on, marking the pages.
    pub(super) fn read(
        &self,
        memory: &GuestMemory,
        into: &Buffers,
        mut offset: u64,
    ) -> Result<(), BlockRequestError> {
        if self.can_transfer_directly(into) {
            let mut at = self.at(offset);
            for (address, len) in into.iter() {
                memory.read_exact_volatile_from(address, &mut at, len as usize)?;
            }
            return Ok(());
        }
        let (mut rest, mut scratch) = (into.clone(), Scratch::new(into.len()));
        while !rest.is_empty() {
            let part = scratch.part(rest.len());
            self.read_bytes(part, offset).map_err(self.failed("read it"))?;
            rest.fill(memory, part)?;
            offset += part.len() as u64;
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
    ) -> Result<(), BlockRequestError> {
        let done = self.write_buffers(memory, from, offset);
        self.modified(offset, from.len());
        done?;
        if durability == Durability::Durable {
            self.flush()?;
        }
        Ok(())
    }

    fn write_buffers(
        &self,
        memory: &GuestMemory,
        from: &Buffers,
        mut offset: u64,
    ) -> Result<(), BlockRequestError> {
        if self.can_transfer_directly(from) {
            let mut at = self.at(offset);
            for (address, len) in from.iter() {
                memory.write_all_volatile_to(address, &mut at, len as usize)?;
            }
            return Ok(());
        }
        let (mut rest, mut scratch) = (from.clone(), Scratch::new(from.len()));
        while !rest.is_empty() {
            let part = scratch.part(rest.len());
            rest.read(memory, part)?;
            self.write_bytes(part, offset)
                .map_err(self.failed("write to it"))?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    fn read_bytes(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.qcow2 {
            Some(image) => image.read(bytes, offset),
            None => self.file.read_exact_at(bytes, offset),
        }
    }

    fn write_bytes(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match &self.qcow2 {
            Some(image) => image.write(bytes, offset),
            None => self.file.write_all_at(bytes, offset),
        }
    }

    /// The disk's file from a byte on, for transfers of guest memory.
    fn at(&self, offset: u64) -> FilePosition<'_> {
        FilePosition {
            file: &self.file,
            offset,
        }
    }

    /// The disk's file, if it is a raw disk.
    pub(super) fn raw_file(&self) -> Option<&File> {
        self.qcow2.is_none().then_some(&self.file)
    }

    /// Makes the error of a system call one that names the disk and what was tried.
    pub(super) fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> BlockBackendError + '_ {
        move |source| BlockBackendError::Io {
            path: self.path.clone(),
            what,
            source,
        }
    }
}

/// Whether the host or the image does not support an operation, or not for such small parts.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput
    )
}

impl HostBackend for BlockBackend {
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
