//! Removing a socket whose process is gone, while others try the same.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, fstat, openat};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::error::{NamedListenerError, failed};
use crate::{NamedListener, connect_now, folder, identity};

/// How long to wait for the lock: its holder needs it for a few system calls, unless it was stopped in between.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often the lock is tried.
const RETRY: Duration = Duration::from_millis(1);

/// Removes the socket at `path` if it refuses connections; an error if it does not. Nothing there is as good.
pub(crate) fn remove_stale(path: &Path) -> Result<(), NamedListenerError> {
    // Two processes that reclaim the same stale socket must not remove each other's.
    let _lock = SocketLock::acquire(path)?;
    if !NamedListener::check_kind(path)? {
        return Ok(());
    }
    match connect_now(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed(path))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(NamedListenerError::InUse { path: path.into() }),
    }
}

/// A locked file beside a socket, which only the socket's user can open. Dropping it removes the file.
struct SocketLock {
    path: PathBuf,
    _file: File,
}

impl SocketLock {
    fn acquire(socket: &Path) -> Result<Self, NamedListenerError> {
        let name = socket.file_name().unwrap_or_default().to_string_lossy();
        let path = folder(socket).join(format!(".{name}.lock"));
        let refused = |reason| NamedListenerError::Locked {
            path: socket.into(),
            lock: path.clone(),
            reason,
        };
        let failed = failed(socket);
        let until = Instant::now() + PATIENCE;
        loop {
            let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let file = match openat(CWD, &path, flags, Mode::RUSR | Mode::WUSR) {
                Ok(file) => File::from(file),
                Err(Errno::ACCESS) => return Err(refused("but it is somebody else's")),
                Err(errno) => return Err(failed(errno.into())),
            };
            let owner = fstat(&file).map_err(|errno| failed(errno.into()))?.st_uid;
            if owner != geteuid().as_raw() {
                return Err(refused("but it is somebody else's"));
            }
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_at(&file, &path).map_err(&failed)? => return Ok(Self { path, _file: file }),
                // Its last holder has removed it.
                Ok(()) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if Instant::now() >= until => {
                    return Err(refused("but another process holds it"));
                }
                Err(Errno::AGAIN) => thread::sleep(RETRY),
                Err(errno) => return Err(failed(errno.into())),
            }
        }
    }
}

impl Drop for SocketLock {
    fn drop(&mut self) {
        // While it is still locked: who opens it now finds out that it is gone once it has the lock.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether the open file is the one that has the name.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(there) => Ok(identity(&there) == identity(&file.metadata()?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
