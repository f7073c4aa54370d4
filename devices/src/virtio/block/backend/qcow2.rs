//! A qcow2 image. Its requests are served one by one, and their data are copied once more than with a raw image.

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

/// How long the end of the process waits for a thread that uses the image.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// An open image with its backing files: only files that the user has named are opened, each once.
#[derive(Debug)]
pub(super) struct Qcow2 {
    /// The image itself first, then its backing files downwards.
    layers: Vec<ImageLayer>,
    read_only: bool,
    image: Mutex<FormatAccess<ImageFile>>,
}

/// One file of the chain.
#[derive(Debug)]
struct ImageLayer {
    file: File,
    path: PathBuf,
    /// Its format if the user has named it; else the header of the image on top of it decides.
    format: Option<ImageFormat>,
}

impl Qcow2 {
    /// Opens the image in `file`, which is at `path`, on these backing files. Opening writes nothing.
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

    /// Drops the cached metadata and reads them anew, as another host may have written to the image.
    pub(super) fn reopen(&self) -> io::Result<()> {
        *self.image() = open(&self.layers, ImageFormat::Qcow2, !self.read_only)?;
        Ok(())
    }

    /// The backing files, from the upper to the lower.
    pub(super) fn backing_files(&self) -> impl Iterator<Item = (&File, &Path)> {
        let files = self.layers.iter().skip(1);
        files.map(|layer| (&layer.file, layer.path.as_path()))
    }

    /// The size that the guest sees, in bytes.
    pub(super) fn size(&self) -> u64 {
        self.image().size()
    }

    pub(super) fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.image().read(bytes, offset)
    }

    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.image().write(bytes, offset)
    }

    /// Discards a range. An error of kind `Unsupported` where the image's version has no such thing.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.image().discard_to_any(offset, len)
    }

    /// Makes a range zero, and gives up its space if `unmap`. Errors as of [`Qcow2::discard`].
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            self.image().discard_to_zero(offset, len)
        } else {
            self.image().write_zeroes(offset, len)
        }
    }

    /// Makes the file's content durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.image().sync()
    }

    /// Writes modified metadata to the file.
    pub(super) fn write_out(&self) -> io::Result<()> {
        self.image().flush()
    }

    /// As [`Qcow2::write_out`], and no thread can write after it. Fails if a thread uses the image for longer than
    /// [`CLOSE_TIMEOUT`], for example because its disk hangs.
    pub(super) fn close(&self) -> io::Result<()> {
        let until = Instant::now() + CLOSE_TIMEOUT;
        let image = loop {
            match self.image.try_lock() {
                Ok(image) => break image,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() >= until => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(CLOSE_TIMEOUT / 1000),
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

/// Opens the first of `layers` on the others. It is an error if its header does not name a backing file exactly where
/// there is one.
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
            // An image may come from anywhere, so its header must not decide which file of the host is opened.
            let at = this.path.parent().unwrap_or(Path::new("")).join(named);
            return Err(refused(format!(
                "expected the backing file of {path} to be named by the user; if it may be read, add backing={}",
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

/// The format of a backing file: as the user or the header of the image on top of it names it. It is not probed, as a
/// guest may have written the file's content.
fn format_of(layer: &ImageLayer, in_image: Option<&str>) -> io::Result<ImageFormat> {
    let path = layer.path.display();
    let in_image = match in_image.filter(|name| !name.is_empty()) {
        None => None,
        // An old name of raw.
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
