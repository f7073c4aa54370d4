//! Huge pages of the host for a test.

use anyhow::{Result, ensure};
use rustix::fs::{FlockOperation, flock};

/// Huge pages that the host has set aside for as long as this lives. One test has them at a time.
pub struct ReservedHugePages {
    before: String,
    _turn: std::fs::File,
}

impl ReservedHugePages {
    const COUNT: &str = "/proc/sys/vm/nr_hugepages";

    /// So many MiB of them, beside those that there are.
    pub fn set_aside(mib: u64) -> Result<Self> {
        let turn = std::fs::File::open(Self::COUNT)?;
        flock(&turn, FlockOperation::LockExclusive)?;
        let before = std::fs::read_to_string(Self::COUNT)?;
        let pages = Self { before, _turn: turn };
        pages.change(mib)?;
        Ok(pages)
    }

    /// So many MiB more than there were at first.
    pub fn change(&self, mib: u64) -> Result<()> {
        let wanted = self.before.trim().parse::<u64>()? + mib / 2;
        std::fs::write(Self::COUNT, wanted.to_string())?;
        let got = std::fs::read_to_string(Self::COUNT)?;
        ensure!(
            got.trim() == wanted.to_string(),
            "expected {wanted} huge pages, got {got}"
        );
        Ok(())
    }
}

impl Drop for ReservedHugePages {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(Self::COUNT, self.before.trim()) {
            eprintln!("{}: expected {:?}, got {error}", Self::COUNT, self.before);
        }
    }
}
