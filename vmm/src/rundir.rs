//! Names of VMs: each is an API socket in a directory of the user's.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use named_socket::{NamedListener, NamedListenerError};
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
        "VM name {got:?}: expected 1 to {NAME_MAX} letters, digits, '.', '_' or '-', not starting with '.', and not \"merge\""
    )]
    BadName { got: String },
    #[error("API socket {path}: in use by a running VM; choose another --name or --api-sock")]
    InUse { path: PathBuf },
    #[error("API socket {path}: expected a free path or a stale socket, got something else")]
    NotASocket { path: PathBuf },
    #[error("API socket")]
    Socket(#[source] NamedListenerError),
    #[error("no VM {name:?}: {path} is not there; `godwit ps` lists the running ones")]
    NoSuchVm { name: String, path: PathBuf },
}

/// A bound API socket. Dropping it removes the socket's file, unless somebody put another in its place.
#[derive(Debug)]
pub struct ApiSocket(NamedListener);

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
        let bound = NamedListener::bind(path).map_err(|error| match error {
            NamedListenerError::InUse { path } => RundirError::InUse { path },
            NamedListenerError::NotASocket { path } => RundirError::NotASocket { path },
            other => RundirError::Socket(other),
        });
        bound.map(Self)
    }

    /// The listening socket.
    pub fn listener(&self) -> &UnixListener {
        self.0.listener()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
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
    // `godwit snapshot merge` is about no VM.
    let is_taken = name == "merge";
    if is_taken
        || name.is_empty()
        || name.len() > NAME_MAX
        || name.starts_with('.')
        || !name.bytes().all(allowed)
    {
        return Err(RundirError::BadName { got: name.into() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_the_way_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let _first = ApiSocket::bind(&path).unwrap();
        assert!(matches!(ApiSocket::bind(&path), Err(RundirError::InUse { .. })));
        let path = directory.path().join("precious");
        fs::write(&path, "data").unwrap();
        let bound = ApiSocket::bind(&path);
        assert!(matches!(bound, Err(RundirError::NotASocket { .. })));
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        for bad in ["", "../x", ".hidden", "a b", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        check_name("web-1.test_2").unwrap();
    }
}
