//! A disk whose file was removed while it is open.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::{Backend, BackendError};

impl Backend {
    /// Fails if its file has no name any more, so that it ends with this process: whoever is to open it later would
    /// find nothing, or another file in its place.
    pub fn check_kept(&self) -> Result<(), BackendError> {
        let open = self.file.metadata().map_err(self.failed("look at it"))?;
        // A node of a block device is not the device.
        if self.is_block_device || open.nlink() > 0 {
            return Ok(());
        }
        // A path through /proc leads to files without a name.
        match fs::metadata(&self.path) {
            Ok(found) if (found.dev(), found.ino()) == (open.dev(), open.ino()) => Ok(()),
            _ => Err(BackendError::Removed {
                path: self.path.clone(),
            }),
        }
    }
}
