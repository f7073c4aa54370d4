//! What hosts carry: the initramfs that all hosts of a lab boot from.

use std::fs;
use std::path::{Path, PathBuf};

use crate::LabError;
use crate::cpio::Archive;

/// The guests that every host has below `/guests`.
const GUESTS: [&str; 4] = ["stock/vmlinux", "stock/vmlinuz", "stock/initrd", "bare/bare"];

/// Files for the hosts: what they are made of, the guests, and what the caller adds.
#[derive(Clone, Debug)]
pub struct Payload {
    artifacts: PathBuf,
    files: Vec<(String, PathBuf)>,
}

impl Payload {
    /// Takes kernel, modules and guests from the folder that `cargo xtask guests` fills.
    pub fn new(artifacts: impl Into<PathBuf>) -> Self {
        Self {
            artifacts: artifacts.into(),
            files: Vec::new(),
        }
    }

    /// Adds an executable file under a path of the host without a leading `/`, e.g. `bin/godwit`. Programs must
    /// be static.
    pub fn with(mut self, path: impl Into<String>, file: impl Into<PathBuf>) -> Self {
        self.files.push((path.into(), file.into()));
        self
    }

    /// The hosts' kernel.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.artifacts.join("lab/vmlinuz")
    }

    /// The hosts' initramfs, not compressed: the emulated CPU would pay for it.
    pub(crate) fn initramfs(&self) -> Result<Vec<u8>, LabError> {
        let lab = self.artifacts.join("lab");
        let mut archive = Archive::new();
        archive.character_device("dev/console", 5, 1)?;
        archive.file("init", 0o755, &read(&lab.join("init"))?)?;
        archive.file("bin/busybox", 0o755, &read(&lab.join("busybox"))?)?;
        archive.symlink("bin/sh", "busybox")?;
        let order = read(&lab.join("modules/order"))?;
        for name in String::from_utf8_lossy(&order).lines() {
            archive.file(
                &format!("modules/{name}"),
                0o644,
                &read(&lab.join("modules").join(name))?,
            )?;
        }
        archive.file("modules/order", 0o644, &order)?;
        for guest in GUESTS {
            archive.file(
                &format!("guests/{guest}"),
                0o644,
                &read(&self.artifacts.join(guest))?,
            )?;
        }
        for (path, file) in &self.files {
            archive.file(path, 0o755, &read(file)?)?;
        }
        Ok(archive.finish()?)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, LabError> {
    fs::read(path).map_err(|source| LabError::Artifact {
        path: path.to_path_buf(),
        source,
    })
}
