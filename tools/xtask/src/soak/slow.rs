//! The scenarios of both lanes on a machine that is slow: the emulators and every `godwit` have a third of its CPU time.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::quota::Quota;
use crate::runner::{Prepared, TestLane, has_kvm};
use crate::steps::Steps;
use crate::workspace::{print_status, root};

/// All of those programs together have one part in so many of the machine's CPU time.
const PARTS: u64 = 3;
/// Of a VM that waits for the pages of another process: it is left out. A vCPU that does so inside a system call spins
/// there while its group is held back (Linux 6.18), which takes time that no program of the group gets back.
const HANDLED: &str = "--uffd";
const EMULATOR: &str = "qemu-system-x86_64";

/// Runs those whose name contains `filter`.
pub(super) fn run(steps: &mut Steps, prepared: &Prepared, filter: Option<&str>) -> Result<()> {
    let quota = Quota::one_in(PARTS)?;
    let folder = root()?.join("target/slow");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let godwit = folder.join("godwit");
    quota.stand_in(&godwit, &prepared.godwit, HANDLED)?;
    quota.stand_in(&folder.join(EMULATOR), &in_path(EMULATOR)?, HANDLED)?;
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([folder].into_iter().chain(env::split_paths(&path)))?;
    let path = ("PATH", path.into_string().ok().context("PATH is no UTF-8")?);
    if has_kvm() {
        let settings = [path.clone(), ("GODWIT_BIN", godwit.display().to_string())];
        steps.tests("direct, slow", || {
            prepared.scenarios(TestLane::Direct, filter, &settings)
        });
    } else {
        steps.not_run("direct, slow", "this machine has no /dev/kvm");
    }
    // Hosts carry the program itself; they are slow with all that is in them.
    steps.tests("lab, slow", || prepared.scenarios(TestLane::Lab, filter, &[path]));
    print_status(format_args!("{}", quota.held_back()?.trim().replace('\n', ", ")));
    Ok(())
}

/// The program of this name that a shell would find.
fn in_path(name: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join(name));
    let mut found = found.filter(|file| Path::is_file(file));
    found.next().with_context(|| format!("{name} is not in the path"))
}
