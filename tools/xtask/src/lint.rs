//! `cargo xtask lint`: formatting, names, clippy, and what the workspace may depend on.

mod licence;
mod names;
mod policy;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use cargo_metadata::MetadataCommand;

use crate::workspace::{cargo, print_status, root, run};

/// The bare guest's workspace: cargo finds its target and flags by the current folder.
const BARE: &str = "guests/bare";

/// A check of the workspace at a path.
type LintCheck = fn(&Path) -> Result<()>;

/// Makes all checks, and fails if one of them does.
pub(crate) fn run_all() -> Result<()> {
    let root = root()?;
    let checks = [
        ("formatting", formatting as LintCheck),
        ("names", type_names),
        ("clippy", clippy),
        ("dependencies", dependencies),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        print_status(name);
        if let Err(error) = check(&root) {
            print_status(format_args!("{name}: {error:#}"));
            failed.push(name);
        }
    }
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("failed: {}", failed.join(", "))
    }
}

fn formatting(root: &Path) -> Result<()> {
    run(cargo().current_dir(root).args(["fmt", "--all", "--check"]))?;
    run(cargo().current_dir(root.join(BARE)).args(["fmt", "--check"]))
}

/// One name for one type, and an opening line in each file, in the workspace and the bare guest.
fn type_names(root: &Path) -> Result<()> {
    let metadata = metadata(root).no_deps().exec()?;
    let manifests = metadata.packages.iter().map(|package| &package.manifest_path);
    let mut folders: Vec<PathBuf> = manifests
        .filter_map(|manifest| Some(manifest.parent()?.into()))
        .collect();
    folders.push(root.join(BARE));
    let violations = names::violations(root, &folders)?;
    violations.iter().for_each(print_status);
    match violations.len() {
        0 => Ok(()),
        count => bail!("{count} names or files are against the rules in tools/xtask/src/lint/names.rs"),
    }
}

fn clippy(root: &Path) -> Result<()> {
    let deny = ["--", "--deny", "warnings"];
    run(cargo()
        .current_dir(root)
        .args([
            "clippy",
            "--quiet",
            "--keep-going",
            "--workspace",
            "--all-targets",
        ])
        .args(deny))?;
    let target = root.join("target/bare");
    let mut bare = cargo();
    bare.current_dir(root.join(BARE))
        .args(["clippy", "--quiet", "--release", "--target-dir"])
        .arg(target);
    run(bare.args(deny))
}

/// Holds what is in the lock file against the policy. Needs no network: clippy has fetched everything.
fn dependencies(root: &Path) -> Result<()> {
    let platform = "--filter-platform=x86_64-unknown-linux-gnu";
    let mut command = metadata(root);
    command.other_options(["--offline", "--locked", platform].map(str::to_owned));
    let violations = policy::violations(&command.exec()?);
    violations.iter().for_each(print_status);
    match violations.len() {
        0 => Ok(()),
        count => bail!("{count} dependencies are against the policy in tools/xtask/src/lint/policy.rs"),
    }
}

/// `cargo metadata` of the workspace.
fn metadata(root: &Path) -> MetadataCommand {
    let mut command = MetadataCommand::new();
    command
        .cargo_path(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(root);
    command
}
