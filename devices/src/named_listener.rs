//! A listening Unix socket with a name in the file system.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// A listening Unix socket, for its owner's user alone. Dropping it removes the socket's file, unless somebody put
/// another in its place.
#[derive(Debug)]
pub struct NamedListener {
    listener: UnixListener,
    path: PathBuf,
    /// The file's device and inode.
    file: (u64, u64),
}

/// A path at which no socket can listen.
#[derive(Debug, thiserror::Error)]
pub enum NamedListenerError {
    /// Somebody listens there.
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

impl NamedListener {
    /// Listens at `path`. A socket file that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> Result<Self, NamedListenerError> {
        let failed = failed(path);
        // Two processes that reclaim the same stale socket must not delete each other's.
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let guard = File::open(parent).map_err(&failed)?;
        flock(&guard, FlockOperation::LockExclusive).map_err(|errno| failed(errno.into()))?;
        if Self::check_kind(path)? {
            match connect_now(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(&failed)?;
                }
                _ => return Err(NamedListenerError::InUse { path: path.into() }),
            }
        }
        let listener = UnixListener::bind(path).map_err(&failed)?;
        let file = fs::symlink_metadata(path).map_err(&failed)?;
        let listener = Self {
            listener,
            path: path.into(),
            file: identity(&file),
        };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(&failed)?;
        Ok(listener)
    }

    /// Whether there is a socket at `path`, stale or not; an error if something else is there.
    pub fn check_kind(path: &Path) -> Result<bool, NamedListenerError> {
        match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.file_type().is_socket() => Ok(true),
            Ok(_) => Err(NamedListenerError::NotASocket { path: path.into() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed(path)(error)),
        }
    }

    /// The listening socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for NamedListener {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|file| identity(&file) == self.file) {
            // If somebody removes it first, the aim is reached.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A connection to the socket at `path`, which does not block. One that cannot be had at once is an error: a program
/// that accepts none must not hold up its callers.
pub(crate) fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match connect(&socket, &SocketAddrUnix::new(path)?) {
            Ok(()) => return Ok(socket.into()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

fn failed(path: &Path) -> impl Fn(io::Error) -> NamedListenerError + '_ {
    move |source| NamedListenerError::Io {
        path: path.into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_in_use_is_refused_and_a_stale_one_reclaimed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let first = NamedListener::bind(&path).unwrap();
        let second = NamedListener::bind(&path);
        assert!(matches!(second, Err(NamedListenerError::InUse { .. })));
        drop(first);
        assert!(!path.exists());

        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        NamedListener::bind(&path).unwrap();
    }

    #[test]
    fn a_listener_that_accepts_nobody_is_in_use_all_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let _first = NamedListener::bind(&path).unwrap();
        let waiting: Vec<_> = std::iter::from_fn(|| connect_now(&path).ok()).collect();
        assert!(!waiting.is_empty());
        let second = NamedListener::bind(&path);
        assert!(matches!(second, Err(NamedListenerError::InUse { .. })));
    }

    #[test]
    fn anothers_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let first = NamedListener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = NamedListener::bind(&path).unwrap();
        drop(first);
        let third = NamedListener::bind(&path);
        assert!(matches!(third, Err(NamedListenerError::InUse { .. })));
    }

    #[test]
    fn other_files_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("precious");
        fs::write(&path, "data").unwrap();
        let bound = NamedListener::bind(&path);
        assert!(matches!(bound, Err(NamedListenerError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }
}
