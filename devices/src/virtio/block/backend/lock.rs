//! Locks on a disk's files: they keep other processes off, and show a destination that its file is the source's own.
//!
//! Locks are on single bytes, so that QEMU's tools can read an image in use, but not write to it:
//!
//! | bytes | by whom | held here |
//! |---|---|---|
//! | 0 to 99 | this program only | exclusively by a writer, shared by a reader |
//! | 100 + n | QEMU: does n with the file | shared: reads; writes, if it is a raw image |
//! | 200 + n | QEMU: no other process may do n | shared: write and resize |
//! | one beyond 2^32 | this program only | shared: a mark, see [`BlockBackend::mark`] |
//!
//! What n means: 0 read, 1 write, 3 resize. QEMU takes its locks shared, and then checks whether another process has
//! one that conflicts with them: one that forbids what QEMU does, or does what QEMU forbids. This program does the
//! same. It also conflicts with a program that locks whole files.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};

use rustix::rand::{GetRandomFlags, getrandom};

use super::super::error::BlockBackendError;
use super::super::sys::{ByteRange, FileLock, find_lock, set_lock};
use super::BlockBackend;

/// The bytes that only this program locks.
const OURS: ByteRange = ByteRange { start: 0, len: 100 };

// What n stands for in the table above.
const READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;

/// The byte that shows that a process does this with the file.
const fn does(what: u64) -> ByteRange {
    ByteRange::byte(100 + what)
}

/// The byte that forbids other processes to do this with the file.
const fn forbids(what: u64) -> ByteRange {
    ByteRange::byte(200 + what)
}

/// The least offset of a mark, beyond those that other programs lock.
const MIN_MARK: u64 = 1 << 32;
/// Bits of a mark's offset: it must be below the largest offset of a file.
const MARK_BITS: u32 = 62;

/// The locks held on a disk.
#[derive(Debug, Default)]
pub(super) struct HeldLocks {
    locked: bool,
    /// The offset of the mark, if there is one.
    mark: Option<u64>,
}

/// How a file is used, which decides its locks.
#[derive(Clone, Copy, Debug)]
struct LockUse {
    writes: bool,
    /// Whether a writer shows itself to QEMU. Not for qcow2: QEMU would then refuse to open the image even for reading.
    shows_writer: bool,
    /// Whether a writer accepts processes that have the file open and rely on its having no writer, as the source has.
    accepts_readers: bool,
}

impl BlockBackend {
    /// The same disk, to be taken over from another host or process that has it locked until then: other readers of the
    /// disk were admitted by that process.
    pub fn taken_over(self) -> Self {
        Self {
            is_taken_over: true,
            ..self
        }
    }

    /// Locks the disk against other processes: exclusively, or shared if it is read-only; backing files are locked
    /// shared. The lock belongs to this open disk, not to the process, and ends with it.
    pub fn lock(&self) -> Result<(), BlockBackendError> {
        let mut held = self.held();
        if held.locked {
            return Ok(());
        }
        for (index, (file, path)) in self.files().enumerate() {
            let writes = index == 0 && !self.read_only;
            let how = LockUse {
                writes,
                shows_writer: self.qcow2.is_none(),
                accepts_readers: self.is_taken_over,
            };
            let taken = take_locks(file, how).map_err(|source| BlockBackendError::Io {
                path: path.to_owned(),
                what: "lock it",
                source,
            });
            let refused = match taken {
                Ok(true) => continue,
                Ok(false) => BlockBackendError::Locked {
                    path: path.to_owned(),
                    read_only: !writes,
                },
                Err(error) => error,
            };
            self.release(&mut held)?;
            return Err(refused);
        }
        // Before the lock another process may have written to the image, for example one that was just ending, so its
        // metadata are read anew. A disk that is taken over is read anew by `invalidate`.
        if let Some(image) = self.qcow2.as_ref().filter(|_| !self.is_taken_over)
            && let Err(source) = image.reopen()
        {
            self.release(&mut held)?;
            return Err(self.failed("open it as qcow2")(source));
        }
        held.locked = true;
        self.warn_hidden_tail();
        Ok(())
    }

    /// Releases the locks and the mark.
    pub fn unlock(&self) -> Result<(), BlockBackendError> {
        self.release(&mut self.held())
    }

    fn release(&self, held: &mut HeldLocks) -> Result<(), BlockBackendError> {
        *held = HeldLocks::default();
        for (file, _) in self.files() {
            set_lock(file, ByteRange::ALL, FileLock::Unlocked).map_err(self.failed("unlock it"))?;
        }
        Ok(())
    }

    /// Locks a byte far beyond the disk's end, at a random offset, and returns the offset: a process that finds exactly
    /// this byte locked has the same files open, on whichever host. The mark stays until the next mark or until the
    /// disk is unlocked.
    pub fn mark(&self) -> Result<u64, BlockBackendError> {
        let mut held = self.held();
        let set = |offset, lock| {
            self.files()
                .try_for_each(|(file, _)| set_lock(file, ByteRange::byte(offset), lock).map(drop))
        };
        let mut mark = || {
            if let Some(before) = held.mark.take() {
                set(before, FileLock::Unlocked)?;
            }
            let mut bits = [0; 8];
            getrandom(&mut bits, GetRandomFlags::empty())?;
            let offset = u64::from_ne_bytes(bits) >> (u64::BITS - MARK_BITS) | MIN_MARK;
            set(offset, FileLock::Shared)?;
            held.mark = Some(offset);
            Ok(offset)
        };
        mark().map_err(self.failed("lock a byte of it"))
    }

    /// Fails unless all files of the disk have this mark, set by another process.
    pub fn check_mark(&self, offset: u64) -> Result<(), BlockBackendError> {
        let mark = ByteRange::byte(offset);
        for (file, path) in self.files() {
            let found = find_lock(file, mark).map_err(self.failed("find the locks on it"))?;
            // Another program's lock on a whole file is not a mark.
            if offset < MIN_MARK || found != Some(mark) {
                let path = path.to_owned();
                return Err(BlockBackendError::NotTheSame { path });
            }
        }
        Ok(())
    }

    /// The disk's files: the one that the guest writes to first, then the backing files.
    pub(super) fn files(&self) -> impl Iterator<Item = (&File, &Path)> {
        let backing = self.qcow2.iter().flat_map(|image| image.backing_files());
        let own = [(&self.file, self.path.as_path())];
        own.into_iter().chain(backing)
    }

    fn held(&self) -> MutexGuard<'_, HeldLocks> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes all locks that this use needs; `Ok(false)` if another process's lock conflicts, and then some locks may have
/// been taken.
fn take_locks(file: &File, how: LockUse) -> io::Result<bool> {
    let ours = if how.writes {
        FileLock::Exclusive
    } else {
        FileLock::Shared
    };
    if !set_lock(file, OURS, ours)? {
        return Ok(false);
    }
    let shown = (how.writes && how.shows_writer).then_some(does(WRITE));
    for byte in [does(READ), forbids(WRITE), forbids(RESIZE)]
        .into_iter()
        .chain(shown)
    {
        if !set_lock(file, byte, FileLock::Shared)? {
            return Ok(false);
        }
    }
    let readers = (how.writes && !how.accepts_readers).then_some(forbids(WRITE));
    for byte in [forbids(READ), does(WRITE), does(RESIZE)]
        .into_iter()
        .chain(readers)
    {
        if find_lock(file, byte)?.is_some() {
            return Ok(false);
        }
    }
    Ok(true)
}
