//! What a migration needs to mirror a disk while its guest runs: a log of writes, the allocated ranges, and the
//! content.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::super::error::BlockBackendError;
use super::super::log::BlockLog;
use super::BlockBackend;
use super::scratch::Scratch;

impl BlockBackend {
    /// Starts a log of the writes to the disk, in place of an earlier one.
    pub fn start_log(&self) -> Arc<BlockLog> {
        self.block_log.start(self.size())
    }

    /// Ends the log.
    pub fn stop_log(&self) {
        self.block_log.stop();
    }

    /// Ranges that may hold data, as offsets and lengths in bytes; everything else is zero.
    pub fn allocated(&self) -> Result<Vec<(u64, u64)>, BlockBackendError> {
        let size = self.size();
        let Some(file) = self.raw_file() else {
            return Ok(vec![(0, size)]);
        };
        // A part that is missing at the disk's end would look like a hole.
        let got = self.file_size()?;
        if got < size {
            return Err(BlockBackendError::Shrunk {
                path: self.path.clone(),
                expected: size,
                got,
            });
        }
        data_ranges(file, size).map_err(self.failed("find the holes in it"))
    }

    /// Reads from byte `offset` of the disk.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), BlockBackendError> {
        let mut scratch = Scratch::new(into.len() as u64);
        let (mut at, mut rest) = (offset, into);
        while !rest.is_empty() {
            // Direct I/O needs aligned memory.
            let part = scratch.part(rest.len() as u64);
            self.read_bytes(part, at).map_err(self.failed("read it"))?;
            let (to, after) = rest.split_at_mut(part.len());
            to.copy_from_slice(part);
            at += part.len() as u64;
            rest = after;
        }
        Ok(())
    }
}

/// The ranges of a file that are not holes, as far as its file system knows.
fn data_ranges(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let (mut at, mut ranges) = (0, Vec::new());
    while at < size {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(size),
            // There is only a hole from here on.
            Err(Errno::NXIO) => break,
            // This file system does not know of holes.
            Err(Errno::INVAL) => at,
            Err(errno) => return Err(errno.into()),
        };
        let hole = seek(file, SeekFrom::Hole(data)).map_or(size, |hole| hole.min(size));
        if hole > data {
            ranges.push((data, hole - data));
        }
        at = hole.max(data + 1);
    }
    Ok(ranges)
}
