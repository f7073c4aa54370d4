//! `cargo xtask lint`: formatting, clippy, and what we may depend on.

mod licence;
mod policy;

use std::path::Path;

use anyhow::{Result, bail};
use cargo_metadata::MetadataCommand;

use crate::workspace::{cargo, root, run, say};

/// Checks the sources; the error of the first check that fails.
pub(crate) fn run_all() -> Result<()> {
    let root = root()?;
    // Its own folder: cargo finds the guest's target and flags by the current one.
    let bare = root.join("guests/bare");
    say("formatting");
    run(cargo().current_dir(&root).args(["fmt", "--all", "--check"]))?;
    run(cargo().current_dir(&bare).args(["fmt", "--check"]))?;
    say("clippy");
    let deny = ["--", "--deny", "warnings"];
    run(cargo()
        .current_dir(&root)
        .args(["clippy", "--quiet", "--workspace", "--all-targets"])
        .args(deny))?;
    let target = root.join("target/bare");
    run(cargo()
        .current_dir(&bare)
        .args(["clippy", "--quiet", "--release", "--target-dir"])
        .arg(target)
        .args(deny))?;
    say("dependencies");
    dependencies(&root)
}

/// Holds what is in the lock file against the policy. Needs no network: clippy has fetched everything.
fn dependencies(root: &Path) -> Result<()> {
    let mut command = MetadataCommand::new();
    command.cargo_path(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let platform = "--filter-platform=x86_64-unknown-linux-gnu";
    command
        .current_dir(root)
        .other_options(["--offline", "--locked", platform].map(str::to_owned));
    let violations = policy::violations(&command.exec()?);
    violations.iter().for_each(say);
    match violations.len() {
        0 => Ok(()),
        count => bail!("{count} dependencies are against the policy in tools/xtask/src/lint/policy.rs"),
    }
}
