//! Listening Unix sockets with a name in the file system. `DESIGN.md` beside this crate's manifest has the rules.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]
// Tests start threads that may take their test along.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod draft;
mod error;
mod reclaim;
#[cfg(test)]
mod tests;

pub use error::NamedListenerError;

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use draft::SocketDraft;
use error::failed;

/// The longest path of a socket in bytes: what `sockaddr_un` has, less its end.
pub const PATH_MAX: usize = 108 - 1;

/// How often another process may take a name that was just found to be free.
const ATTEMPTS: usize = 8;

/// A listening Unix socket, for its owner's user alone. Dropping it removes the socket's file, unless another file has
/// replaced it.
#[derive(Debug)]
pub struct NamedListener {
    listener: UnixListener,
    path: PathBuf,
    /// The file's device and inode.
    file: (u64, u64),
}

impl NamedListener {
    /// Listens at `path`. A socket file on which no process listens any more is replaced.
    pub fn bind(path: &Path) -> Result<Self, NamedListenerError> {
        let got = path.as_os_str().len();
        if !(1..=PATH_MAX).contains(&got) {
            let path = path.into();
            return Err(NamedListenerError::Length { path, got });
        }
        // What is obviously in the way is an error before anything is made.
        Self::check_kind(path)?;
        let mut draft = SocketDraft::listen(path)?;
        for _ in 0..ATTEMPTS {
            match draft.publish(path) {
                Ok(file) => {
                    return Ok(Self {
                        listener: draft.into_listener(),
                        path: path.into(),
                        file,
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => reclaim::remove_stale(path)?,
                Err(error) => return Err(failed(path)(error)),
            }
        }
        Err(NamedListenerError::InUse { path: path.into() })
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
            // If another process removes it first, that is as good.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A connection to the socket at `path`, which does not block. One that cannot be had at once is an error: a program
/// that accepts none must not hold up its callers.
pub fn connect_now(path: &Path) -> io::Result<UnixStream> {
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

/// The folder that `path` is in.
fn folder(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// A file's device and inode.
fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}
