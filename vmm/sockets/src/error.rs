//! Why a socket cannot have a name.

use std::io;
use std::path::{Path, PathBuf};

use crate::PATH_MAX;

/// A path at which no socket can listen.
#[derive(Debug, thiserror::Error)]
pub enum NamedListenerError {
    /// No client could connect to a longer path.
    #[error("socket {}: expected a path of 1 to {PATH_MAX} bytes, got {got}", path.display())]
    Length {
        /// Where.
        path: PathBuf,
        /// Bytes of the path.
        got: usize,
    },
    /// A process listens on the socket.
    #[error("socket {}: in use: somebody listens there", path.display())]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// A file is there that is not ours to remove.
    #[error("socket {}: expected a free path or a stale socket, got something else", path.display())]
    NotASocket {
        /// Where.
        path: PathBuf,
    },
    /// The lock under which a stale socket is removed belongs to another user, or is held for too long.
    #[error("socket {}: is stale, and cannot be removed: expected to get the lock {}, {reason}", path.display(), lock.display())]
    Locked {
        /// Where.
        path: PathBuf,
        /// The lock's file.
        lock: PathBuf,
        /// What came instead.
        reason: &'static str,
    },
    /// A system call failed.
    #[error("socket {}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Makes the error of a system call.
pub(crate) fn failed(path: &Path) -> impl Fn(io::Error) -> NamedListenerError + '_ {
    move |source| NamedListenerError::Io {
        path: path.into(),
        source,
    }
}
