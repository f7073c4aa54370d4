//! qcow2 images, as QEMU's own tools make and see them.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{Finished, PATIENCE, TestProcess};

/// An image.
#[derive(Debug)]
pub struct Image {
    path: String,
}

impl Image {
    /// Makes one of so many bytes.
    pub fn make(path: &Path, bytes: u64) -> Result<Self> {
        Self::create(path, &[], &bytes.to_string())
    }

    /// Makes one that is on a raw image.
    pub fn make_on(path: &Path, base: &str) -> Result<Self> {
        Self::create(path, &["-b", base, "-F", "raw"], "")
    }

    fn create(path: &Path, options: &[&str], size: &str) -> Result<Self> {
        let path = path.display().to_string();
        let size = (!size.is_empty()).then_some(size);
        let words = [
            &["create", "-q", "-f", "qcow2"],
            options,
            &[&path],
            size.as_slice(),
        ]
        .concat();
        qemu("qemu-img", &words)?.expect_code(0)?;
        Ok(Self { path })
    }

    /// An image that is there.
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.display().to_string(),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Bytes of the disk that it has, as its file says, also while a guest uses it.
    pub fn mapped(&self) -> Result<u64> {
        let finished = qemu("qemu-img", &["map", "--output=json", "-f", "qcow2", &self.path])?;
        let map: Value = serde_json::from_str(&finished.expect_code(0)?.stdout)?;
        let ranges = map.as_array().context("a map")?.iter();
        // Deeper extents are in its backing image.
        let data = ranges.filter(|range| range["data"] == true && range["depth"] == 0);
        Ok(data.filter_map(|range| range["length"].as_u64()).sum())
    }

    /// Checks it with `qemu-img check`; clusters without a reference count only if it was to be `whole`.
    pub fn check(&self, whole: bool) -> Result<()> {
        const LEAKED: i32 = 3;
        let finished = qemu("qemu-img", &["check", "-f", "qcow2", &self.path])?;
        let leaked = !whole && finished.expect_code(LEAKED).is_ok();
        ensure!(
            leaked || finished.expect_code(0).is_ok(),
            "{}{}",
            finished.stdout,
            finished.stderr
        );
        Ok(())
    }
}

/// Runs one of QEMU's tools.
pub fn qemu(program: &str, words: &[&str]) -> Result<Finished> {
    let mut command = Command::new(program);
    command.args(words);
    TestProcess::run(command, PATIENCE)
}
