//! `PUT /snapshot`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::migrate::RequestError;

/// Body of `PUT /snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The directory that is to be made; absolute.
    pub path: PathBuf,
    /// Whether the guest goes on here afterwards; otherwise the VM ends.
    #[serde(default)]
    pub keep_running: bool,
    /// Only what was written since the last snapshot.
    #[serde(default)]
    pub diff: bool,
    /// Have the guest run on at once, and copy its memory before it changes. Only of a whole snapshot whose guest goes on.
    #[serde(default)]
    pub live: bool,
}

/// How far the memory of a snapshot is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotProgress {
    /// Bytes of guest memory that were looked at.
    pub done_bytes: u64,
    /// All bytes of guest memory.
    pub total_bytes: u64,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// The directory.
    pub path: PathBuf,
    /// Its own name, by which differences to it know it: 32 hexadecimal digits.
    pub id: String,
    /// The snapshot that it is a difference to, if it is one.
    pub base: Option<String>,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Bytes of it that are in the snapshot and not zero, and so take up space.
    pub stored_bytes: u64,
    /// How long the guest stood still; where it does not go on, until the snapshot was complete.
    pub paused_ms: f64,
    /// From the request to the complete snapshot.
    pub total_ms: f64,
}

impl SnapshotRequest {
    /// A server's working directory is not its client's.
    pub fn check(&self) -> Result<(), RequestError> {
        if !self.path.is_absolute() {
            return Err(RequestError::RelativePath(self.path.clone()));
        }
        if self.live && (self.diff || !self.keep_running) {
            return Err(RequestError::Live);
        }
        Ok(())
    }
}
