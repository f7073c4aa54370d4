//! A disk whose file was removed while it is open.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::super::error::BlockBackendError;
use super::BlockBackend;

impl BlockBackend {
    /// Fails if a file of the disk has no name any more, so that its content ends with this process: a process that
    /// opens the path later would find nothing, or another file.
    pub fn check_kept(&self) -> Result<(), BlockBackendError> {
        for (file, path) in self.files() {
            let open = file.metadata().map_err(self.failed("read its metadata"))?;
            // A block device goes on without the node that names it.
            if open.file_type().is_block_device() || open.nlink() > 0 {
                continue;
            }
            // A path through /proc leads to files without a name.
            match fs::metadata(path) {
                Ok(found) if (found.dev(), found.ino()) == (open.dev(), open.ino()) => {}
                _ => {
                    let path = path.to_owned();
                    return Err(BlockBackendError::Removed { path });
                }
            }
        }
        Ok(())
    }
}
