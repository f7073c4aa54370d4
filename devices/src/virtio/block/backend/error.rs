//! Why a disk cannot be used.

use std::io;
use std::path::PathBuf;

/// Why a disk cannot be used. Every message is one line that names the path.
#[derive(Debug, thiserror::Error)]
pub enum BlockBackendError {
    /// Nothing is there.
    #[error("disk {}: expected a file or a block device, found nothing there", path.display())]
    Missing {
        /// The disk.
        path: PathBuf,
    },
    /// Its file has no name any more.
    #[error("disk {}: expected its file to be there for whoever takes the guest over, but it was removed; only a migration with its content (--with-disks) keeps it", path.display())]
    Removed {
        /// Where it was.
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
    /// It is no raw image, or on a file system without direct I/O.
    #[error("disk {}: expected a raw disk that can be opened with O_DIRECT, got another; leave direct=on out", path.display())]
    NotDirect {
        /// The disk.
        path: PathBuf,
    },
    /// It has lost its end.
    #[error("disk {}: expected its {expected} bytes, got {got}: it has shrunk", path.display())]
    Shrunk {
        /// The disk.
        path: PathBuf,
        /// The size that the guest knows, in bytes.
        expected: u64,
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
    /// It has not the mark of the disk that it was to be.
    #[error("disk {}: expected the source's disk, got a file that the source has not locked", path.display())]
    NotTheSame {
        /// The disk, or a file that it is on.
        path: PathBuf,
    },
    /// A raw disk is on nothing.
    #[error("disk {}: expected no backing file of a raw disk, got {}", path.display(), got.display())]
    NoImage {
        /// The disk.
        path: PathBuf,
        /// What was named.
        got: PathBuf,
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
