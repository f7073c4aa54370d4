//! A file system of a test's own, which is soon full, and a block device on it.
#![allow(unsafe_code)] // A thread leaves the mounts of the others.

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::tool::tool;

/// A file system in memory that only the thread which made it sees, and the programs that this thread starts. It ends
/// with them at the latest.
pub struct SmallFileSystem {
    path: PathBuf,
}

impl SmallFileSystem {
    /// Mounts one of so many MiB at `path`, which is made.
    pub fn mount(path: PathBuf, mib: u64) -> Result<Self> {
        // SAFETY: descriptors stay shared; what is unshared are mounts and the current folder.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.context("mounts of this thread alone")?;
        // Otherwise other threads would see what is mounted here.
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        fs::create_dir(&path)?;
        let options = CString::new(format!("size={mib}M"))?;
        mount("none", &path, "tmpfs", MountFlags::empty(), options.as_c_str())
            .with_context(|| format!("tmpfs at {}", path.display()))?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.path, UnmountFlags::DETACH) {
            eprintln!("{}: cannot be unmounted: {error}", self.path.display());
        }
    }
}

/// A block device whose sectors are in a file.
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// One on that file.
    pub fn of(file: &Path) -> Result<Self> {
        let shown = tool(
            "losetup",
            ["--find".as_ref(), "--show".as_ref(), file.as_os_str()],
        )?;
        let device = Self {
            path: shown.trim_end().into(),
        };
        // Linux's loop driver reports a write as done of which only a part was. With requests of one page there are no parts.
        device.set_merges("2").context("requests that are not merged")?;
        Ok(device)
    }

    fn set_merges(&self, value: &str) -> io::Result<()> {
        let name = self.path.file_name().unwrap_or_default();
        let queue = Path::new("/sys/class/block").join(name).join("queue");
        fs::write(queue.join("nomerges"), value)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let merges = self.set_merges("0").map_err(Into::into);
        // A program that has the device open keeps it until it closes it.
        let detached = tool("losetup", ["--detach".as_ref(), self.path.as_os_str()]);
        if let Err(error) = merges.and(detached) {
            eprintln!("{}: cannot be given back: {error}", self.path.display());
        }
    }
}
