//! A qcow2 image. Requests are served one by one, and what they move is copied once more than a raw image's.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use imago::file::File as ImageFile;
use imago::qcow2::Qcow2 as Image;
use imago::storage::StorageOpenOptions;
use imago::{FormatAccess, PermissiveImplicitOpenGate};

/// An open image, with whatever it is on.
#[derive(Debug)]
pub(super) struct Qcow2(Mutex<FormatAccess<ImageFile>>);

impl Qcow2 {
    /// What `file`, which is at `path`, holds. Nothing is written by opening it.
    pub(super) fn open(file: &File, path: &Path, read_only: bool) -> io::Result<Self> {
        Ok(Self(Mutex::new(open(file, path, read_only)?)))
    }

    /// Forgets what is known of the image and looks anew, as another host may have written to it.
    pub(super) fn reopen(&self, file: &File, path: &Path, read_only: bool) -> io::Result<()> {
        *self.image() = open(file, path, read_only)?;
        Ok(())
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

    /// Makes data durable, and where they are.
    pub(super) fn flush(&self) -> io::Result<()> {
        let image = self.image();
        image.flush()?;
        image.sync()
    }

    fn image(&self) -> MutexGuard<'_, FormatAccess<ImageFile>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open(file: &File, path: &Path, read_only: bool) -> io::Result<FormatAccess<ImageFile>> {
    let options = StorageOpenOptions::new().filename(path).write(!read_only);
    let file = ImageFile::from_open_file(file.try_clone()?, options)?;
    let mut image = Image::<ImageFile>::open_image(file, !read_only)?;
    if image.requires_external_data_file() {
        return Err(unsupported(
            "expected its data in the image itself, got an external data file".into(),
        ));
    }
    if let (Some(file), None) = (image.implicit_backing_file(), image.implicit_backing_format()) {
        // To guess would be to trust a guest that wrote to it.
        let message = format!("expected the format of its backing file {file:?} in the image, got none");
        return Err(unsupported(message));
    }
    image.open_implicit_dependencies_gated(PermissiveImplicitOpenGate::default())?;
    Ok(FormatAccess::new(image))
}

fn unsupported(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, message)
}
