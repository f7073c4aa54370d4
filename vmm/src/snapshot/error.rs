//! What can go wrong with a snapshot.

use std::io;
use std::path::{Path, PathBuf};

use migration::PageSetError;
use migration_io::MemoryIoError;
use thiserror::Error;

use super::SnapshotId;
use super::manifest::FORMAT;
use crate::memory::MemoryError;

/// A snapshot could not be written or read.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum SnapshotError {
    #[error(
        "snapshot {0}: expected a path of which nothing exists but the directory around it, got something"
    )]
    Exists(PathBuf),
    #[error("snapshot {0}: expected the path of a new directory")]
    BadPath(PathBuf),
    #[error("{path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{0}: expected a regular file, got something else")]
    NoFile(PathBuf),
    #[error(
        "{path}: expected a snapshot of format {FORMAT}, got format {got}: use the godwit that it is for"
    )]
    Format { path: PathBuf, got: u32 },
    #[error("{path}: expected a snapshot's manifest")]
    Manifest {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{path}: expected {expected} bytes, got {got}")]
    Length { path: PathBuf, expected: u64, got: u64 },
    #[error("{path}: expected at most {most} bytes, got {got}")]
    TooLong { path: PathBuf, most: u64, got: u64 },
    #[error("{path}: expected checksum {expected}, got {got}: the file is damaged")]
    Checksum {
        path: PathBuf,
        expected: String,
        got: String,
    },
    #[error(
        "{path}: expected checksum {expected:016x} of the {len} bytes at {offset}, got {got:016x}: the file is damaged"
    )]
    MemoryBlock {
        path: PathBuf,
        offset: u64,
        len: u64,
        expected: u64,
        got: u64,
    },
    #[error("{path}: expected an ordinary machine's memory")]
    Regions { path: PathBuf, source: PageSetError },
    #[error(
        "{path}: expected a whole snapshot, got a difference to snapshot {base}: \
         put them together with `godwit snapshot merge`"
    )]
    IsDifference { path: PathBuf, base: SnapshotId },
    #[error(
        "memory in huge pages cannot be mapped from a file: use --prefetch, --preload, or --uffd with a page-fault handler"
    )]
    HugePages,
    #[error(
        "live snapshot: expected memory of this process's own (no --shared-memory, no --huge-pages, and not mapped from \
         another snapshot: restore that with --prefetch or --preload): leave out --live"
    )]
    NotLive,
    #[error(
        "live snapshot: expected a kernel that shows which pages are protected (Linux 5.13): leave out --live"
    )]
    NotShown,
    #[error("{0}: expected a difference (`godwit snapshot --diff`), got a whole snapshot")]
    IsWhole(PathBuf),
    #[error("{path}: expected snapshot {expected} before it, to which it is a difference, got {got}")]
    OtherBase {
        path: PathBuf,
        expected: SnapshotId,
        got: SnapshotId,
    },
    #[error("{0}: expected a difference of a machine with the same memory")]
    OtherMemory(PathBuf),
    #[error("{0}: expected each page once, got one twice")]
    TwiceChanged(PathBuf),
    #[error("nothing to merge: expected at least one difference")]
    NothingToMerge,
    #[error("no name for the snapshot")]
    Id(#[source] io::Error),
    #[error("cancelled")]
    Cancelled,
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Content(#[from] MemoryIoError),
    #[error("threads for a snapshot's memory")]
    Thread(#[source] io::Error),
}

impl SnapshotError {
    pub(super) fn io(path: &Path) -> impl Fn(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            path: path.clone(),
            source,
        }
    }
}
