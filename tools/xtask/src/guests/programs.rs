//! This workspace's programs that run in guests and emulated hosts.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::cache::{ArtifactCache, Key};
use crate::workspace::{cargo, output, run};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The guest without Linux: `bare/bare`. Its folder has its own cargo configuration, which cargo finds by the
/// current folder.
pub(super) fn bare(root: &Path, cache: &ArtifactCache) -> Result<()> {
    let folder = root.join("guests/bare");
    let mut key = Key::new("bare 1").text(compiler()?);
    for path in [".cargo/config.toml", "guests/core", "guests/bare"] {
        key = key.path(&root.join(path))?;
    }
    cache.make("bare", &key, &["bare/bare"], || {
        let target = root.join("target/bare");
        run(cargo()
            .current_dir(&folder)
            .args(["build", "--quiet", "--release", "--target-dir"])
            .arg(&target))?;
        cache.copy(&target.join(TARGET).join("release/bare"), "bare/bare")
    })
}

/// The workload agent of Linux guests; returns its path.
pub(super) fn agent(root: &Path, cache: &ArtifactCache) -> Result<PathBuf> {
    member(
        root,
        cache,
        "agent",
        &["guests/agent", "guests/core"],
        &["--package", "guest-agent"],
        "guest-agent",
        "cache/agent",
    )
}

/// The first program of an emulated host: `lab/init`.
pub(super) fn lab_host(root: &Path, cache: &ArtifactCache) -> Result<()> {
    let sources = ["tools/lab/Cargo.toml", "tools/lab/src", "tools/lab/host"];
    let build = ["--package", "lab", "--bin", "lab-host"];
    member(root, cache, "lab-host", &sources, &build, "lab-host", "lab/init").map(|_| ())
}

fn member(
    root: &Path,
    cache: &ArtifactCache,
    name: &str,
    sources: &[&str],
    build: &[&str],
    binary: &str,
    artifact: &str,
) -> Result<PathBuf> {
    let mut key = Key::new("member 2").text(compiler()?);
    for path in ["Cargo.toml", "Cargo.lock", ".cargo/config.toml"]
        .iter()
        .chain(sources)
    {
        key = key.path(&root.join(path))?;
    }
    cache.make(name, &key, &[artifact], || {
        let target = root.join("target");
        run(cargo()
            .current_dir(root)
            .args(["build", "--quiet", "--profile", "guest"])
            .args(build)
            .arg("--target-dir")
            .arg(&target))?;
        cache.copy(&target.join(TARGET).join("guest").join(binary), artifact)
    })?;
    Ok(cache.path(artifact))
}

fn compiler() -> Result<String> {
    output(cargo().arg("--version"))
}
