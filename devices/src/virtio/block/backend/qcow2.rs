//! A qcow2 image. Requests are served one by one, and what they move is copied once more than a raw image's.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use imago::FormatAccess;
use imago::file::File as ImageFile;
use imago::qcow2::Qcow2 as Image;
use imago::raw::Raw;
use imago::storage::StorageOpenOptions;

use super::super::error::BlockBackendError;
use super::open::{Access, BackingFile, ImageFormat, open_disk};

/// How long the end of a process waits for whoever has an image.
const CLOSING: Duration = Duration::from_secs(2);

/// An open image, with what it is on: nothing is opened but what was named, and that once.
#[derive(Debug)]
pub(super) struct Qcow2 {
    /// From the image itself down.
    layers: Vec<ImageLayer>,
    read_only: bool,
    image: Mutex<FormatAccess<ImageFile>>,
}

/// A file of an image.
#[derive(Debug)]
struct ImageLayer {
    file: File,
    path: PathBuf,
    /// What it is, where that was said; else the image above says.
    format: Option<ImageFormat>,
}

impl Qcow2 {
    /// What `file`, which is at `path`, holds, on these files. Nothing is written by opening it.
    pub(super) fn open(
        file: &File,
        path: &Path,
        read_only: bool,
        backing: &[BackingFile],
    ) -> Result<Self, BlockBackendError> {
        let failed = |source| BlockBackendError::Io {
            path: path.to_owned(),
            what: "open it as qcow2",
            source,
        };
        let mut layers = vec![ImageLayer {
            file: file.try_clone().map_err(failed)?,
            path: path.to_owned(),
            format: Some(ImageFormat::Qcow2),
        }];
        for BackingFile { path, format } in backing {
            let access = Access {
                read_only: true,
                ..Access::default()
            };
            layers.push(ImageLayer {
                file: open_disk(path, access)?.0,
                path: path.clone(),
                format: *format,
            });
        }
        let image = open(&layers, ImageFormat::Qcow2, !read_only).map_err(failed)?;
        Ok(Self {
            layers,
            read_only,
            image: Mutex::new(image),
        })
    }

    /// Forgets what is known of the image and looks anew, as another host may have written to it.
    pub(super) fn reopen(&self) -> io::Result<()> {
        *self.image() = open(&self.layers, ImageFormat::Qcow2, !self.read_only)?;
        Ok(())
    }

    /// The files that it is on, from the upper to the lower.
    pub(super) fn below(&self) -> impl Iterator<Item = (&File, &Path)> {
        let below = self.layers.iter().skip(1);
        below.map(|layer| (&layer.file, layer.path.as_path()))
    }

    /// What the guest sees, in bytes.
    pub(super) fn size(&self) -> u64 {
        self.image().size()
    }

    pub(super) fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.image().read(bytes, offset)
    }

    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.image().write(bytes, offset)
    }

    /// An error of kind `Unsupported` where the image's version has no such thing.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.image().discard_to_any(offset, len)
    }

    /// As [`Qcow2::discard`].
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            self.image().discard_to_zero(offset, len)
        } else {
            self.image().write_zeroes(offset, len)
        }
    }

    /// Makes durable what is in the file.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.image().sync()
    }

    /// Puts into the file where data are.
    pub(super) fn write_out(&self) -> io::Result<()> {
        self.image().flush()
    }

    /// Does that, and nobody writes after it. An error if somebody has the image for longer than [`CLOSING`], as one who
    /// is waiting for a disk that hangs.
    pub(super) fn close(&self) -> io::Result<()> {
        let until = Instant::now() + CLOSING;
        let image = loop {
            match self.image.try_lock() {
                Ok(image) => break image,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() >= until => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(CLOSING / 1000),
            }
        };
        let done = image.flush();
        std::mem::forget(image);
        done
    }

    fn image(&self) -> MutexGuard<'_, FormatAccess<ImageFile>> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the first of `layers` holds, on the others. What its header names is what they are, or nothing.
fn open(layers: &[ImageLayer], format: ImageFormat, writable: bool) -> io::Result<FormatAccess<ImageFile>> {
    let (this, below) = layers.split_first().ok_or(io::ErrorKind::NotFound)?;
    let options = StorageOpenOptions::new().filename(&this.path).write(writable);
    let file = ImageFile::from_open_file(this.file.try_clone()?, options)?;
    let path = this.path.display();
    if format == ImageFormat::Raw {
        return match below.first() {
            None => Ok(FormatAccess::new(Raw::open_image(file, writable)?)),
            Some(named) => Err(refused(format!(
                "expected no backing file of {path}, which is raw, got {}",
                named.path.display()
            ))),
        };
    }
    let mut image = Image::<ImageFile>::open_image(file, writable)?;
    if image.requires_external_data_file() {
        return Err(refused(format!(
            "expected the data of {path} in the image itself, got an external data file"
        )));
    }
    image.set_data_file(None);
    let named = image.implicit_backing_file();
    let below = match (named, below.first()) {
        (None, None) => None,
        (None, Some(ImageLayer { path: got, .. })) => {
            let got = got.display();
            return Err(refused(format!(
                "expected no backing file of {path}, which has none, got {got}"
            )));
        }
        (Some(named), None) => {
            // What an image names is its maker's word, and the host's files are not his.
            let at = this.path.parent().unwrap_or(Path::new("")).join(named);
            return Err(refused(format!(
                "expected the backing file of {path} to be named by whoever starts the guest; if it may be read, add backing={}",
                at.display()
            )));
        }
        (Some(_), Some(next)) => {
            let format = format_of(next, image.implicit_backing_format().map(String::as_str))?;
            Some(open(below, format, false)?)
        }
    };
    image.set_backing(below);
    Ok(FormatAccess::new(image))
}

/// What a backing file is: as was said, or as the image on it says. To look at it would be to trust a guest that wrote
/// to it.
fn format_of(layer: &ImageLayer, in_image: Option<&str>) -> io::Result<ImageFormat> {
    let path = layer.path.display();
    let in_image = match in_image.filter(|name| !name.is_empty()) {
        None => None,
        // An old name.
        Some("file") => Some(ImageFormat::Raw),
        Some(name) => Some(name.parse().map_err(io::Error::other)?),
    };
    match (layer.format, in_image) {
        (Some(said), Some(found)) if said != found => Err(refused(format!(
            "expected backing file {path} to be {said}, but the image on it says {found}"
        ))),
        (Some(format), _) | (None, Some(format)) => Ok(format),
        (None, None) => Err(refused(format!(
            "expected the format of backing file {path} to be said, here or in the image on it; add backing-format=raw or qcow2"
        ))),
    }
}

fn refused(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, message)
}
