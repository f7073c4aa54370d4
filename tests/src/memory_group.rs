//! A cgroup of a test's own, which has little memory.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Where hierarchies of cgroups that limit memory may be, the file for the limit, and the one that must be
/// written to before a group of version 2 has that file.
const PLACES: [(&str, &str, Option<&str>); 2] = [
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", None),
    ("/sys/fs/cgroup", "memory.max", Some("cgroup.subtree_control")),
];

/// Removed when it is dropped; what runs in it must have ended by then.
pub struct MemoryGroup {
    path: PathBuf,
}

impl MemoryGroup {
    /// One that may have so many MiB.
    pub fn limited(mib: u64) -> Result<Self> {
        let there =
            |(root, _, _): &&(&str, &str, Option<&str>)| Path::new(root).join("cgroup.procs").exists();
        let (root, limit, controllers) = PLACES
            .iter()
            .find(there)
            .context("no cgroups that limit memory")?;
        if let Some(file) = controllers {
            fs::write(Path::new(root).join(file), "+memory").context("memory for groups")?;
        }
        let path = Path::new(root).join(format!("godwit-test-{}-{mib}", std::process::id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        let group = Self { path };
        fs::write(group.path.join(limit), (mib << 20).to_string()).context("the limit")?;
        Ok(group)
    }

    /// A program that enters the group, and runs what comes after it there.
    pub fn program(&self) -> Vec<OsString> {
        let enter = "echo $$ > \"$0\" && exec \"$@\"";
        let procs = self.path.join("cgroup.procs");
        vec!["sh".into(), "-c".into(), enter.into(), procs.into()]
    }

    /// Fails if the kernel has killed something in it.
    pub fn check_nothing_killed(&self) -> Result<()> {
        for file in ["memory.oom_control", "memory.events"] {
            let text = fs::read_to_string(self.path.join(file)).unwrap_or_default();
            let killed = text.lines().filter_map(|line| line.strip_prefix("oom_kill "));
            for count in killed {
                ensure!(count.trim() == "0", "{file}: {text}");
            }
        }
        Ok(())
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            eprintln!("{}: cannot be removed: {error}", self.path.display());
        }
    }
}
