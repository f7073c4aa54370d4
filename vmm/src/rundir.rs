//! Names of VMs: each is an API socket in a directory of the user's.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

const SUFFIX: &str = "sock";
const NAME_MAX: usize = 64;

/// A name or an API socket cannot be had.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum RundirError {
    #[error("run-time directory {path}")]
    Directory { path: PathBuf, source: io::Error },
    #[error("run-time directory {path}: expected mode 0700 and your own, got mode {mode:04o}, owner {owner}")]
    NotPrivate { path: PathBuf, mode: u32, owner: u32 },
    #[error(
        "VM name {got:?}: expected 1 to {NAME_MAX} letters, digits, '.', '_' or '-', not starting with '.'"
    )]
    BadName { got: String },
    #[error("API socket {path}: in use by a running VM; choose another --name or --api-sock")]
    InUse { path: PathBuf },
    #[error("API socket {path}: expected a free path or a stale socket, got something else")]
    NotASocket { path: PathBuf },
    #[error("API socket {path}")]
    Socket { path: PathBuf, source: io::Error },
    #[error("no VM {name:?}: {path} is not there; `godwit ps` lists the running ones")]
    NoSuchVm { name: String, path: PathBuf },
}

/// A bound API socket. Dropping it removes the socket's file, unless somebody put another in its place.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    path: PathBuf,
    /// The file's device and inode.
    file: (u64, u64),
}

impl ApiSocket {
    /// Binds the socket of the VM `name`, in the run-time directory.
    pub fn for_name(name: &str) -> Result<Self, RundirError> {
        check_name(name)?;
        let directory = directory()?;
        create_private(&directory)?;
        Self::bind(&directory.join(format!("{name}.{SUFFIX}")))
    }

    /// Binds a socket at `path`. A socket file that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> Result<Self, RundirError> {
        let wrap = |source| RundirError::Socket {
            path: path.into(),
            source,
        };
        // Two processes that reclaim the same stale socket must not delete each other's.
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let guard = File::open(parent).map_err(wrap)?;
        flock(&guard, FlockOperation::LockExclusive).map_err(|error| wrap(error.into()))?;
        if let Ok(metadata) = fs::symlink_metadata(path) {
            use std::os::unix::fs::FileTypeExt;
            if !metadata.file_type().is_socket() {
                return Err(RundirError::NotASocket { path: path.into() });
            }
            match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(wrap)?;
                }
                _ => return Err(RundirError::InUse { path: path.into() }),
            }
        }
        let listener = UnixListener::bind(path).map_err(wrap)?;
        let file = fs::symlink_metadata(path).map_err(wrap)?;
        let socket = Self {
            listener,
            path: path.into(),
            file: (file.dev(), file.ino()),
        };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(wrap)?;
        Ok(socket)
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

impl Drop for ApiSocket {
    fn drop(&mut self) {
        let ours = |file: Metadata| (file.dev(), file.ino()) == self.file;
        if fs::symlink_metadata(&self.path).is_ok_and(ours) {
            // If somebody removes it first, the aim is reached.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The socket of `vm`, which is a name or a path (anything with a slash).
pub fn resolve(vm: &str) -> Result<PathBuf, RundirError> {
    if vm.contains('/') {
        return Ok(vm.into());
    }
    check_name(vm)?;
    let path = directory()?.join(format!("{vm}.{SUFFIX}"));
    if path.exists() {
        Ok(path)
    } else {
        Err(RundirError::NoSuchVm {
            name: vm.into(),
            path,
        })
    }
}

/// Names and sockets of all VMs in the run-time directory, by name. Sockets that nobody listens on are left
/// out.
pub fn list() -> Result<Vec<(String, PathBuf)>, RundirError> {
    let directory = directory()?;
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            return Err(RundirError::Directory {
                path: directory,
                source,
            });
        }
    };
    let mut found: Vec<_> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == SUFFIX))
        .filter(|path| UnixStream::connect(path).is_ok())
        .filter_map(|path| Some((path.file_stem()?.to_str()?.to_owned(), path)))
        .collect();
    found.sort();
    Ok(found)
}

fn directory() -> Result<PathBuf, RundirError> {
    Ok(match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(base) if !base.is_empty() => PathBuf::from(base).join("godwit"),
        _ => PathBuf::from("/run/godwit"),
    })
}

fn create_private(path: &Path) -> Result<(), RundirError> {
    let wrap = |source| RundirError::Directory {
        path: path.into(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(wrap)?;
    let metadata = fs::metadata(path).map_err(wrap)?;
    let mode = metadata.mode() & 0o7777;
    let owner = metadata.uid();
    if mode & 0o077 != 0 || owner != rustix::process::geteuid().as_raw() {
        return Err(RundirError::NotPrivate {
            path: path.into(),
            mode,
            owner,
        });
    }
    Ok(())
}

/// Whether a VM can have this name.
pub fn check_name(name: &str) -> Result<(), RundirError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.is_empty() || name.len() > NAME_MAX || name.starts_with('.') || !name.bytes().all(allowed) {
        return Err(RundirError::BadName { got: name.into() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_in_use_is_refused_and_a_stale_one_reclaimed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let first = ApiSocket::bind(&path).unwrap();
        assert!(matches!(ApiSocket::bind(&path), Err(RundirError::InUse { .. })));
        drop(first);
        assert!(!path.exists());

        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        ApiSocket::bind(&path).unwrap();
    }

    #[test]
    fn another_vms_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let first = ApiSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = ApiSocket::bind(&path).unwrap();
        drop(first);
        assert!(matches!(ApiSocket::bind(&path), Err(RundirError::InUse { .. })));
    }

    #[test]
    fn other_files_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(
            ApiSocket::bind(&path),
            Err(RundirError::NotASocket { .. })
        ));
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        for bad in ["", "../x", ".hidden", "a b", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        check_name("web-1.test_2").unwrap();
    }
}
