//! A Unix socket of a device, by which programs on the host reach the guest. It is there while this process runs the
//! guest.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use named_socket::{NamedListener, NamedListenerError};
use rustix::event::epoll::EventFlags;
use rustix::fs::{Access, AtFlags, CWD, accessat};

use crate::watch::HostWatch;

/// A socket that is in the file system from [`HostSocket::listen`] to [`HostSocket::close`]. Its functions may be
/// called from any thread.
#[derive(Debug)]
pub(crate) struct HostSocket {
    path: PathBuf,
    listener: Mutex<Option<NamedListener>>,
}

/// Why there can be no socket at a path.
#[derive(Debug, thiserror::Error)]
pub enum HostSocketError {
    /// The path is too long for a socket.
    #[error("socket {}: expected a path of 1 to {most} bytes, got {got}", path.display())]
    Length {
        /// The socket.
        path: PathBuf,
        /// Most bytes of a path.
        most: usize,
        /// Bytes of this path.
        got: usize,
    },
    /// The socket's folder does not exist.
    #[error("socket {}: expected its folder to be there, found none", path.display())]
    NoFolder {
        /// The socket.
        path: PathBuf,
    },
    /// The path cannot be used.
    #[error(transparent)]
    Listener(#[from] NamedListenerError),
    /// A system call failed.
    #[error("socket {}: cannot {what}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl HostSocket {
    /// A socket that will be at `path`, which may have `most` bytes.
    pub(crate) fn at(path: &Path, most: usize) -> Result<Self, HostSocketError> {
        let got = path.as_os_str().len();
        if !(1..=most).contains(&got) {
            let path = path.into();
            return Err(HostSocketError::Length { path, most, got });
        }
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        if !folder.is_dir() {
            return Err(HostSocketError::NoFolder { path: path.into() });
        }
        // The socket is made when this process takes over the guest. An error would be too late then, so the folder's
        // permissions are checked now.
        let writable = Access::WRITE_OK | Access::EXEC_OK;
        if let Err(errno) = accessat(CWD, folder, writable, AtFlags::EACCESS) {
            return Err(HostSocketError::Io {
                path: path.into(),
                what: "make a socket in its folder",
                source: errno.into(),
            });
        }
        NamedListener::check_kind(path)?;
        Ok(Self {
            path: path.into(),
            listener: Mutex::new(None),
        })
    }

    /// The socket's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Binds the socket and adds it to `watch`, unless it listens already.
    pub(crate) fn listen(&self, watch: &HostWatch, token: u64) -> Result<(), HostSocketError> {
        let mut listener = self.listener();
        if listener.is_some() {
            return Ok(());
        }
        let bound = NamedListener::bind(&self.path)?;
        bound
            .listener()
            .set_nonblocking(true)
            .map_err(self.failed("listen without waiting"))?;
        watch
            .add(bound.listener(), token, EventFlags::IN)
            .map_err(self.failed("watch it"))?;
        *listener = Some(bound);
        Ok(())
    }

    /// Closes the socket and removes it from the file system.
    pub(crate) fn close(&self) {
        *self.listener() = None;
    }

    /// The next program that has connected, without waiting; `None` if none has.
    pub(crate) fn accept(&self) -> io::Result<Option<UnixStream>> {
        let listener = self.listener();
        let Some(listener) = listener.as_ref() else {
            return Ok(None);
        };
        match listener.listener().accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(stream))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes an error from what was tried.
    pub(crate) fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> HostSocketError + '_ {
        move |source| HostSocketError::Io {
            path: self.path.clone(),
            what,
            source,
        }
    }

    fn listener(&self) -> MutexGuard<'_, Option<NamedListener>> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
