//! `PATCH /drives/{id}`, with Firecracker's fields.

use std::path::{Path, PathBuf};

use devices::{BucketError, Limits};
use serde::Deserialize;

use crate::config::LimitsSection;
use crate::supervisor::Refusal;

/// Body of `PATCH /drives/{id}`. Whatever it says, the file's size is looked at anew, and the guest told.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// The disk's name.
    pub drive_id: String,
    /// Its file, if that is to be said: no other one can be put in its place.
    path_on_host: Option<PathBuf>,
    /// Limits that are to change.
    #[serde(default)]
    rate_limiter: Option<LimitsSection>,
}

impl DriveUpdate {
    /// The limits that the disk is to have in place of `before`.
    pub(crate) fn limits(&self, before: Limits) -> Result<Limits, BucketError> {
        let limits = self.rate_limiter.map_or(before, |limits| limits.over(before));
        limits.check()?;
        Ok(limits)
    }

    /// Refuses another file than the one at `path`.
    pub(crate) fn check_path(&self, path: &Path) -> Result<(), Refusal> {
        match &self.path_on_host {
            Some(other) if other != path => Err(Refusal::Failed(format!(
                "disk {:?}: expected its own path_on_host, {path:?}, got {other:?}",
                self.drive_id
            ))),
            _ => Ok(()),
        }
    }
}
