//! Names of VMs: each is an API socket in a directory of the user's.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use named_socket::{NamedListener, NamedListenerError};
use thiserror::Error;

const SUFFIX: &str = "sock";
const LOG_SUFFIX: &str = "log";
/// Where names are without a run-time directory of the user's own.
const ROOT_DIRECTORY: &str = "/run/godwit";
const NAME_MAX: usize = 64;

/// A name or an API socket cannot be had.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum RundirError {
    #[error("run-time directory {path}")]
    Directory { path: PathBuf, source: io::Error },
    #[error("run-time directory {path}: expected mode 0700 and your own, got mode {mode:04o}, owner {owner}")]
    NotPrivate { path: PathBuf, mode: u32, owner: u32 },
    #[error("log {path}")]
    Log { path: PathBuf, source: io::Error },
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

/// A bound API socket. Dropping it removes the socket's file, unless another file has replaced it.
#[derive(Debug)]
pub struct ApiSocket(NamedListener);

impl ApiSocket {
    /// Binds the socket of the VM `name`, in the run-time directory.
    pub fn for_name(name: &str) -> Result<Self, RundirError> {
        check_name(name)?;
        let directory = directory();
        if let Some(base) = environment().filter(|base| !directory.starts_with(base)) {
            let (used, base) = (directory.display(), base.display());
            tracing::warn!(
                "VMs have their names in {used}: somebody else could replace {base} (XDG_RUNTIME_DIR)"
            );
        }
        create_private(&directory)?;
        Self::bind(&directory.join(format!("{name}.{SUFFIX}")))
    }

    /// Binds a socket at `path`. A socket file on which no process listens any more is replaced.
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
    let mut paths = places()
        .into_iter()
        .map(|place| place.join(format!("{vm}.{SUFFIX}")));
    paths
        .find(|path| path.exists())
        .ok_or_else(|| RundirError::NoSuchVm {
            name: vm.into(),
            path: directory().join(format!("{vm}.{SUFFIX}")),
        })
}

/// Names and sockets in the run-time directory, by name. That of a VM that was killed is among them.
pub fn list() -> Result<Vec<(String, PathBuf)>, RundirError> {
    let mut found = BTreeMap::new();
    for directory in places() {
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => {
                return Err(RundirError::Directory {
                    path: directory,
                    source,
                });
            }
        };
        let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
        for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == SUFFIX)) {
            if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
                found.entry(name.to_owned()).or_insert(path);
            }
        }
    }
    Ok(found.into_iter().collect())
}

/// Where VMs are looked for: first where this user has theirs, then in the environment's directory where that is
/// another user's. A name in both is the first one's, so that no other user can put a VM in the place of one of root's.
fn places() -> Vec<PathBuf> {
    let mut places = vec![directory()];
    places.extend(environment().map(|base| base.join("godwit")));
    places.dedup();
    places
}

/// Where the log of a VM is that was started with `--detach`: it stays until the name is used again.
pub fn log_path(name: &str) -> Result<PathBuf, RundirError> {
    check_name(name)?;
    Ok(directory().join(format!("{name}.{LOG_SUFFIX}")))
}

/// The log of a VM that is being started. It has its name when the VM has: until then that may be a running VM's. It
/// goes when this is dropped before.
#[derive(Debug)]
pub struct LogDraft {
    file: tempfile::NamedTempFile,
    path: PathBuf,
}

impl LogDraft {
    /// An empty file beside the one that a VM of this name is to have.
    pub fn create(name: &str) -> Result<Self, RundirError> {
        let path = log_path(name)?;
        let directory = directory();
        create_private(&directory)?;
        let file = tempfile::Builder::new()
            .prefix(&format!(".{name}.{LOG_SUFFIX}."))
            .tempfile_in(&directory);
        let file = file.map_err(|source| RundirError::Log {
            path: path.clone(),
            source,
        })?;
        Ok(Self { file, path })
    }

    /// Where it is now.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Gives it its name, in place of the log of the VM that had that before. Returns where it is then.
    pub fn publish(self) -> Result<PathBuf, RundirError> {
        let path = self.path;
        match self.file.persist(&path) {
            Ok(_) => Ok(path),
            Err(error) => Err(RundirError::Log {
                path,
                source: error.error,
            }),
        }
    }
}

fn environment() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_RUNTIME_DIR").filter(|base| !base.is_empty());
    base.map(PathBuf::from)
}

fn directory() -> PathBuf {
    let user = rustix::process::geteuid().as_raw();
    match environment() {
        // Root with another user's environment (`sudo -E`): that user could put another directory in its place.
        Some(base) if user == 0 && !is_beyond_others(&base, user) => ROOT_DIRECTORY.into(),
        Some(base) => base.join("godwit"),
        None => ROOT_DIRECTORY.into(),
    }
}

/// Whether only `user` and root can rename or replace what leads to `path`.
fn is_beyond_others(path: &Path, user: u32) -> bool {
    const STICKY: u32 = 0o1000;
    const OTHERS_WRITE: u32 = 0o022;
    let Ok(path) = std::path::absolute(path) else {
        return false;
    };
    // What is not there yet is made by us, in what is.
    let Some(path) = path
        .ancestors()
        .find_map(|ancestor| fs::canonicalize(ancestor).ok())
    else {
        return false;
    };
    path.ancestors().all(|ancestor| {
        fs::symlink_metadata(ancestor).is_ok_and(|metadata| {
            let ours = metadata.uid() == 0 || metadata.uid() == user;
            ours && (metadata.mode() & OTHERS_WRITE == 0 || metadata.mode() & STICKY != 0)
        })
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
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_in_the_way_is_named() {
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
    fn a_directory_that_another_user_can_replace_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let us = rustix::process::geteuid().as_raw();
        let inner = directory.path().join("inner");
        fs::create_dir(&inner).unwrap();
        // A directory that is safe for this user is not for another one, unless this user is root, whom all users
        // trust.
        assert!(is_beyond_others(&inner.join("new"), us));
        assert_eq!(is_beyond_others(&inner, us + 1), us == 0);
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(!is_beyond_others(&inner, us));
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        assert!(is_beyond_others(&inner, us));
        if us == 0 {
            std::os::unix::fs::chown(directory.path(), Some(1000), None).unwrap();
            assert!(!is_beyond_others(&inner, us) && is_beyond_others(&inner, 1000));
        }
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        for bad in ["", "../x", ".hidden", "a b", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        check_name("web-1.test_2").unwrap();
    }
}
