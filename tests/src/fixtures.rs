//! What a scenario needs from outside: the program, the guests, how often to repeat.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The program under test and the guests.
#[derive(Clone, Debug)]
pub struct Fixtures {
    /// The static `godwit`.
    pub godwit: PathBuf,
    /// The folder that `cargo xtask guests` fills.
    pub guests: PathBuf,
}

impl Fixtures {
    /// Those that the environment names (`GODWIT_BIN`, `GODWIT_GUESTS`).
    pub fn from_env() -> Result<Self> {
        Ok(Self {
            godwit: path("GODWIT_BIN")?,
            guests: path("GODWIT_GUESTS")?,
        })
    }

    /// The program and the guest without Linux, copied to a folder.
    pub fn copied_to(&self, folder: &Path) -> Result<Self> {
        let copied = Self {
            godwit: folder.join("godwit"),
            guests: folder.into(),
        };
        fs::create_dir(folder.join("bare"))?;
        for (from, to) in [(&self.godwit, &copied.godwit), (&self.bare(), &copied.bare())] {
            fs::copy(from, to).with_context(|| from.display().to_string())?;
        }
        Ok(copied)
    }

    /// The guest without Linux.
    pub fn bare(&self) -> PathBuf {
        self.guests.join("bare/bare")
    }

    /// The Debian guest's kernel: `vmlinux` or `vmlinuz`.
    pub fn stock_kernel(&self, name: &str) -> PathBuf {
        self.guests.join("stock").join(name)
    }

    /// The Debian guest's initrd.
    pub fn stock_initrd(&self) -> PathBuf {
        self.guests.join("stock/initrd")
    }

    /// A file of the tiny Linux guest: `vmlinux` or `initrd`.
    pub fn tiny(&self, name: &str) -> PathBuf {
        self.guests.join("tiny").join(name)
    }

    /// What `godwit probe --json` says of this machine.
    pub fn probe(&self) -> Result<Value> {
        let output = Command::new(&self.godwit).args(["probe", "--json"]).output();
        let output = output.with_context(|| format!("cannot start {}", self.godwit.display()))?;
        serde_json::from_slice(&output.stdout).context("godwit probe --json printed no JSON")
    }
}

fn path(variable: &str) -> Result<PathBuf> {
    let value = std::env::var_os(variable);
    let path = PathBuf::from(
        value.with_context(|| format!("{variable} is not set: run through `cargo xtask test`"))?,
    );
    ensure!(
        path.exists(),
        "{variable}: {} is not there: run through `cargo xtask test`",
        path.display()
    );
    Ok(path)
}

/// How often a scenario repeats: `GODWIT_COUNT`, or what `test` does.
pub fn count(sample: u32) -> Result<u32> {
    match std::env::var("GODWIT_COUNT") {
        Ok(text) => text
            .parse()
            .with_context(|| format!("GODWIT_COUNT: expected a number, got {text:?}")),
        Err(_) => Ok(sample),
    }
}

/// Memory of the guest that moves, in MiB: `GODWIT_MEMORY_MIB`, or what `test` takes.
pub fn memory(sample: u64) -> Result<u64> {
    match std::env::var("GODWIT_MEMORY_MIB") {
        Ok(text) => text
            .parse()
            .with_context(|| format!("GODWIT_MEMORY_MIB: expected a number, got {text:?}")),
        Err(_) => Ok(sample),
    }
}
