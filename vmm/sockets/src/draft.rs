//! A socket that listens already, under a hidden name.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, RenameFlags, fchmod, renameat_with};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{NamedListenerError, failed};
use crate::{PATH_MAX, folder, identity};

/// How many programs may wait to be accepted: what Linux allows by default.
const BACKLOG: i32 = 4096;

/// A socket that does not have its name yet.
pub(crate) struct SocketDraft {
    listener: UnixListener,
    /// Its file, until it has a name.
    hidden: Option<HiddenFile>,
}

/// A file that goes when this is dropped.
struct HiddenFile(PathBuf);

impl SocketDraft {
    /// A socket that only its owner may connect to, hidden in the folder of `path`.
    pub(crate) fn listen(path: &Path) -> Result<Self, NamedListenerError> {
        Self::make(folder(path)).map_err(failed(path))
    }

    fn make(folder: &Path) -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // Linux makes the file with the mode of the socket's own inode (net/unix/af_unix.c, unix_bind_bsd).
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        let hidden = folder.join(hidden_name()?);
        bind_at(&socket, folder, &hidden)?;
        let hidden = HiddenFile(hidden);
        listen(&socket, BACKLOG)?;
        Ok(Self {
            listener: socket.into(),
            hidden: Some(hidden),
        })
    }

    /// Gives it its name, if nothing has that. Returns the file's device and inode.
    pub(crate) fn publish(&mut self, path: &Path) -> io::Result<(u64, u64)> {
        let Some(HiddenFile(hidden)) = &self.hidden else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let file = fs::symlink_metadata(hidden)?;
        renameat_with(CWD, hidden, CWD, path, RenameFlags::NOREPLACE)?;
        // There is nothing under the hidden name any more.
        std::mem::forget(self.hidden.take());
        Ok(identity(&file))
    }

    /// The socket. It keeps its file only if that has its name.
    pub(crate) fn into_listener(self) -> UnixListener {
        self.listener
    }
}

impl Drop for HiddenFile {
    fn drop(&mut self) {
        // No other process knows the file. If it cannot be removed, nothing else can be done.
        let _ = fs::remove_file(&self.0);
    }
}

/// Binds to `path`, which is in `folder`, by way of the folder's descriptor if the path is too long for a socket.
fn bind_at(socket: &OwnedFd, folder: &Path, path: &Path) -> io::Result<()> {
    if path.as_os_str().len() <= PATH_MAX {
        return Ok(bind(socket, &SocketAddrUnix::new(path)?)?);
    }
    let folder = File::open(folder)?;
    let name = path.file_name().unwrap_or_default();
    let short = Path::new("/proc/self/fd")
        .join(folder.as_raw_fd().to_string())
        .join(name);
    Ok(bind(socket, &SocketAddrUnix::new(short)?)?)
}

/// A name that cannot be guessed, and that no socket has.
fn hidden_name() -> io::Result<String> {
    let mut random = [0; 8];
    let got = getrandom(&mut random, GetRandomFlags::empty())?;
    if got < random.len() {
        return Err(io::Error::other("expected 8 random bytes, got fewer"));
    }
    Ok(format!(".{:016x}.new", u64::from_ne_bytes(random)))
}
