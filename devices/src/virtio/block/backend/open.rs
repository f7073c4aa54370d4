//! How a disk's file is opened, and which alignment it then demands of requests.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, statx};

use super::super::error::BlockBackendError;

/// How a disk is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// For reading only.
    pub read_only: bool,
    /// Without the host's cache (O_DIRECT).
    pub direct: bool,
    /// The file's format.
    pub format: ImageFormat,
}

/// The format of a disk's file. The user names it, and it is never guessed: a guest can write anything to a raw image,
/// also what looks like another format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImageFormat {
    /// The disk's bytes.
    #[default]
    Raw,
    /// A qcow2 image.
    Qcow2,
}

/// A backing file of an image, as the user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingFile {
    /// The file's path.
    pub path: PathBuf,
    /// Its format; `None` to take that from the header of the image on top of it.
    pub format: Option<ImageFormat>,
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// Not the name of an [`ImageFormat`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("format: expected raw or qcow2, got {0:?}")]
pub struct ImageFormatError(String);

impl FromStr for ImageFormat {
    type Err = ImageFormatError;

    fn from_str(text: &str) -> Result<Self, ImageFormatError> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(ImageFormatError(text.into())),
        }
    }
}

/// What was found in place of a disk.
const A_DIRECTORY: &str = "a directory";

/// Opens a disk, or a file of one; returns whether it is a block device.
pub(super) fn open_disk(path: &Path, access: Access) -> Result<(File, bool), BlockBackendError> {
    let failed = |what| {
        move |source| BlockBackendError::Io {
            path: path.to_owned(),
            what,
            source,
        }
    };
    let file = open(path, access)?;
    let kind = file.metadata().map_err(failed("read its metadata"))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let got = if kind.is_dir() {
            A_DIRECTORY
        } else {
            "something else"
        };
        let path = path.to_owned();
        return Err(BlockBackendError::NotADisk { path, got });
    }
    // From now on calls may block.
    fcntl_getfl(&file)
        .and_then(|flags| fcntl_setfl(&file, flags - OFlags::NONBLOCK))
        .map_err(|errno| failed("make it wait for I/O")(errno.into()))?;
    Ok((file, kind.is_block_device()))
}

/// Opens a path that may turn out not to be a disk.
fn open(path: &Path, access: Access) -> Result<File, BlockBackendError> {
    if access.direct && access.format != ImageFormat::Raw {
        let path = path.to_owned();
        return Err(BlockBackendError::NotDirect { path });
    }
    // Without O_NONBLOCK a FIFO would block before it could be refused.
    let direct = if access.direct { libc::O_DIRECT } else { 0 };
    let opened = OpenOptions::new()
        .read(true)
        .write(!access.read_only)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | direct)
        .open(path);
    let path = path.to_owned();
    opened.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => BlockBackendError::Missing { path },
        io::ErrorKind::IsADirectory => BlockBackendError::NotADisk {
            path,
            got: A_DIRECTORY,
        },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            BlockBackendError::Permission {
                path,
                read_only: access.read_only,
            }
        }
        io::ErrorKind::InvalidInput if access.direct => BlockBackendError::NotDirect { path },
        _ => BlockBackendError::Io {
            path,
            what: "open it",
            source,
        },
    })
}

/// What direct I/O demands, in bytes: powers of two.
#[derive(Clone, Copy, Debug)]
pub(super) struct Alignment {
    /// Alignment of the addresses and lengths of buffers.
    pub(super) memory: u32,
    /// Alignment of offsets on the disk.
    pub(super) offset: u32,
}

impl Alignment {
    /// The alignment that the kernel reports (statx(2), STATX_DIOALIGN). A kernel before 6.1, or a file system without
    /// such limits, reports nothing: then the alignment is a sector.
    pub(super) fn of(file: &File) -> Self {
        let sector = super::SECTOR_SIZE as u32;
        let (memory, offset) = match statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
            Ok(status) => (status.stx_dio_mem_align, status.stx_dio_offset_align),
            Err(_) => (0, 0),
        };
        let or_sector = |reported: u32| {
            if reported.is_power_of_two() {
                reported
            } else {
                sector
            }
        };
        Self {
            memory: or_sector(memory),
            offset: or_sector(offset).max(sector),
        }
    }
}
