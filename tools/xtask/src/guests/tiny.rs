//! The tiny guest: a kernel with its own configuration from Debian's source package, and the agent as first program.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use ::lab::cpio::Archive;
use anyhow::{Context, Result, ensure};

use super::cache::{ArtifactCache, Key};
use crate::packages::{self, Unpacked};
use crate::workspace::{output, print_status};

/// The package with the kernel's source.
pub(super) const SOURCE: &str = "linux-source-6.1";
/// What the kernel's build needs on the system.
const TOOLS: [&str; 9] = [
    "bc",
    "bison",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "make",
    "patch",
    "xz-utils",
];
const CONFIG: &str = "guests/kernel/config";
const PATCHES: &str = "guests/kernel/patches";

/// Makes `tiny/vmlinux`. The source is fetched for that and removed afterwards.
pub(super) fn kernel(root: &Path, cache: &ArtifactCache, source: &Unpacked) -> Result<()> {
    let config = root.join(CONFIG);
    let patches = patches(&root.join(PATCHES))?;
    // Contents, not paths: a checkout elsewhere may be given what was built here.
    let mut key = Key::new("tiny kernel 1").text(&source.version);
    for path in std::iter::once(&config).chain(&patches) {
        key = key.text(read(path)?);
    }
    cache.make("tiny-kernel", &key, &["tiny/vmlinux"], || {
        packages::ensure(&TOOLS)?;
        packages::download(source)
            .context("the kernel's source; `cargo xtask guests --update` looks for a newer one")?;
        let work = tempfile::tempdir_in(cache.path("cache")).context("cannot write to target/guests")?;
        print_status("building the tiny guest's kernel, which takes some minutes");
        let tree = Tree::unpack(source, work.path())?;
        tree.patch(&patches)?;
        tree.configure(&config)?;
        let vmlinux = tree.build()?;
        cache.copy(&vmlinux, "tiny/vmlinux")?;
        // 140 MB that only another configuration would need again.
        fs::remove_dir_all(&source.root).with_context(|| format!("cannot remove {}", source.root.display()))
    })
}

/// Makes `tiny/initrd`. It is not compressed: the host may interpret the guest's kernel.
pub(super) fn initrd(cache: &ArtifactCache, agent: &Path) -> Result<()> {
    let key = Key::new("tiny initrd 2").path(agent)?;
    cache.make("tiny-initrd", &key, &["tiny/initrd"], || {
        let agent = fs::read(agent).with_context(|| format!("cannot read {}", agent.display()))?;
        let mut archive = Archive::new();
        for folder in ["dev", "proc", "sys", "mnt"] {
            archive.folder(folder)?;
        }
        // The kernel opens it for the first program before anything is mounted.
        archive.character_device("dev/console", 5, 1)?;
        archive.file("init", 0o755, &agent)?;
        cache.write("tiny/initrd", &archive.finish()?)
    })
}

/// The files of a folder in the order of their names.
fn patches(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut patches = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    patches.sort();
    Ok(patches)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// A tree of the kernel's source.
struct Tree {
    folder: PathBuf,
}

impl Tree {
    fn unpack(source: &Unpacked, folder: &Path) -> Result<Self> {
        let archive = source.root.join(format!("usr/src/{SOURCE}.tar.xz"));
        output(
            Command::new("tar")
                .args(["--extract", "--xz", "--strip-components=1", "--file"])
                .arg(&archive)
                .arg("--directory")
                .arg(folder),
        )?;
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    fn patch(&self, patches: &[PathBuf]) -> Result<()> {
        for patch in patches {
            output(
                Command::new("patch")
                    .args(["--strip=1", "--forward", "--batch", "--input"])
                    .arg(patch)
                    .current_dir(&self.folder),
            )?;
        }
        Ok(())
    }

    /// The smallest configuration and a fragment on top; an error names the lines that did not take.
    fn configure(&self, fragment: &Path) -> Result<()> {
        let wanted = read(fragment)?;
        let path = self.folder.join(".config");
        self.make(&["tinyconfig"])?;
        let mut config = OpenOptions::new().append(true).open(&path).context(".config")?;
        config.write_all(wanted.as_bytes()).context(".config")?;
        self.make(&["olddefconfig"])?;
        let refused = refused(&wanted, &read(&path)?);
        ensure!(
            refused.is_empty(),
            "{}: the kernel does not take these lines: {}",
            fragment.display(),
            refused.join(", ")
        );
        Ok(())
    }

    fn build(&self) -> Result<PathBuf> {
        let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.make(&[&format!("--jobs={jobs}"), "vmlinux"])?;
        Ok(self.folder.join("vmlinux"))
    }

    fn make(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new("make");
        command
            .args(["--silent", "ARCH=x86_64"])
            .args(arguments)
            .current_dir(&self.folder);
        // A make that runs this program must not pass its flags on; the rest makes equal input give equal output.
        command
            .env_remove("MAKEFLAGS")
            .env("KBUILD_BUILD_USER", "godwit")
            .env("KBUILD_BUILD_HOST", "godwit")
            .env("KBUILD_BUILD_TIMESTAMP", "2026-01-01");
        output(&mut command).map(drop)
    }
}

/// The lines of a fragment that do not hold in a configuration.
fn refused<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let holds = |line: &&str| match line
        .strip_prefix("# ")
        .and_then(|line| line.strip_suffix(" is not set"))
    {
        // What cannot be set at all has no line.
        Some(off) => !config
            .lines()
            .any(|line| line.strip_prefix(off).is_some_and(|rest| rest.starts_with('='))),
        None => config.lines().any(|other| other == *line),
    };
    let says = |line: &&str| line.starts_with("CONFIG_") || line.starts_with("# CONFIG_");
    fragment
        .lines()
        .filter(says)
        .filter(|line| !holds(line))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_do_not_hold_are_found() {
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\nCONFIG_D=\"x y\"\nCONFIG_EE=y\n";
        let good =
            "# A comment\n\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D=\"x y\"\n# CONFIG_E is not set\n";
        assert!(refused(good, config).is_empty());
        let bad = "CONFIG_B=y\n# CONFIG_C is not set\nCONFIG_D=\"x\"\nCONFIG_F=y\n";
        assert_eq!(refused(bad, config), bad.lines().collect::<Vec<_>>());
    }
}
