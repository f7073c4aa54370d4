//! Locks on a disk's files: they keep others off, and show a destination that a file is the source's own.
//!
//! Locks are on bytes, so that QEMU's tools can look at an image that is in use and nobody can write to it:
//!
//! | bytes | by whom | held here |
//! |---|---|---|
//! | 0 to 99 | this program alone | exclusively by who writes, shared by who reads |
//! | 100 + n | QEMU: does n with the file | shared: reads; writes, if it is a raw image |
//! | 200 + n | QEMU: nobody else may do n | shared: write and resize |
//! | one beyond 2^32 | this program alone | shared: a mark, see [`BlockBackend::mark`] |
//!
//! What n means: 0 read, 1 write, 3 resize. QEMU takes its locks shared, and then looks whether somebody has one that
//! forbids what it is about to do, or does what it forbids; so does this. A program that locks whole files is kept off,
//! and keeps off.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};

use rustix::rand::{GetRandomFlags, getrandom};

use super::super::error::BlockBackendError;
use super::super::sys::{ByteRange, FileLock, find_lock, set_lock};
use super::BlockBackend;

const OURS: ByteRange = ByteRange { start: 0, len: 100 };
const READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;

/// Does this with the file.
const fn does(what: u64) -> ByteRange {
    ByteRange::byte(100 + what)
}

/// Nobody else may do this with the file.
const fn forbids(what: u64) -> ByteRange {
    ByteRange::byte(200 + what)
}

/// Marks are beyond what anybody else locks, and below the largest offset of a file.
const LEAST_MARK: u64 = 1 << 32;
const MARK_BITS: u32 = 62;

/// What is locked of a disk.
#[derive(Debug, Default)]
pub(super) struct HeldLocks {
    locked: bool,
    mark: Option<u64>,
}

/// What a file is to be used for.
#[derive(Clone, Copy, Debug)]
struct LockUse {
    writes: bool,
    /// QEMU must know that somebody writes. It opens no image of its own format then, not even to look at it.
    says_so: bool,
    /// Whether there may be readers who rely on nobody writing.
    before_readers: bool,
}

impl BlockBackend {
    /// The same disk, which is another host's, or another process's, until that lets go of it: who reads it by then was
    /// let in by that one.
    pub fn taken_over(self) -> Self {
        Self {
            is_taken_over: true,
            ..self
        }
    }

    /// Locks the disk against other users: exclusively, or shared if it is read-only, and shared whatever an image is on.
    /// The lock belongs to this open disk, not to the process, and ends with it.
    pub fn lock(&self) -> Result<(), BlockBackendError> {
        let mut held = self.held();
        if held.locked {
            return Ok(());
        }
        for (index, (file, path)) in self.files().enumerate() {
            let writes = index == 0 && !self.read_only;
            let how = LockUse {
                writes,
                says_so: self.qcow2.is_none(),
                before_readers: self.is_taken_over,
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
        // Before it was locked somebody may have written to it, a process that was just ending say: what is known of it
        // counts only from here on. One that is taken over is read when it is ours, by `invalidate`.
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

    /// Gives the lock up, and the mark.
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

    /// Locks a byte far beyond the disk's end, at an offset that nobody can guess, and returns that: whoever finds
    /// exactly this byte locked has the same files open, on whichever host. It stays until the next one or until the
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
            let offset = u64::from_ne_bytes(bits) >> (u64::BITS - MARK_BITS) | LEAST_MARK;
            set(offset, FileLock::Shared)?;
            held.mark = Some(offset);
            Ok(offset)
        };
        mark().map_err(self.failed("lock a byte of it"))
    }

    /// Fails unless all files of the disk have this mark, by somebody else who has them open.
    pub fn check_mark(&self, offset: u64) -> Result<(), BlockBackendError> {
        let mark = ByteRange::byte(offset);
        for (file, path) in self.files() {
            let found = find_lock(file, mark).map_err(self.failed("look for locks on it"))?;
            // Somebody else's lock on all of a file is no mark.
            if offset < LEAST_MARK || found != Some(mark) {
                let path = path.to_owned();
                return Err(BlockBackendError::NotTheSame { path });
            }
        }
        Ok(())
    }

    /// The disk's files, from the one that the guest writes to down.
    pub(super) fn files(&self) -> impl Iterator<Item = (&File, &Path)> {
        let below = self.qcow2.iter().flat_map(|image| image.below());
        let own = [(&self.file, self.path.as_path())];
        own.into_iter().chain(below)
    }

    fn held(&self) -> MutexGuard<'_, HeldLocks> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes all that this use needs; `Ok(false)` if somebody is in the way, and then some of it may be taken.
fn take_locks(file: &File, how: LockUse) -> io::Result<bool> {
    let ours = if how.writes {
        FileLock::Exclusive
    } else {
        FileLock::Shared
    };
    if !set_lock(file, OURS, ours)? {
        return Ok(false);
    }
    let says = (how.writes && how.says_so).then_some(does(WRITE));
    for byte in [does(READ), forbids(WRITE), forbids(RESIZE)]
        .into_iter()
        .chain(says)
    {
        if !set_lock(file, byte, FileLock::Shared)? {
            return Ok(false);
        }
    }
    let readers = (how.writes && !how.before_readers).then_some(forbids(WRITE));
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
