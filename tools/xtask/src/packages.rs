//! Debian packages: unpacked beside the build where that is enough, installed only where it is not.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::workspace::{output, print_status};

/// What a failure of apt is most often about.
const NEEDS_ROOT: &str = "apt-get needs root (or sudo) and the package archive";

/// A package that lies unpacked below `target`.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// The package's name.
    pub(crate) name: String,
    /// Its version.
    pub(crate) version: String,
    /// Where its files are.
    pub(crate) root: PathBuf,
}

/// What the package index says of a package.
pub(crate) struct Candidate {
    /// The package's name.
    pub(crate) name: String,
    /// The version that would be installed.
    pub(crate) version: String,
    depends: String,
}

impl Candidate {
    /// The first dependency whose name starts with `prefix`.
    pub(crate) fn dependency(&self, prefix: &str) -> Result<String> {
        let names = self
            .depends
            .split([',', '|'])
            .filter_map(|entry| entry.split_whitespace().next());
        let found = names.into_iter().find(|name| name.starts_with(prefix));
        found.map(str::to_owned).with_context(|| {
            format!(
                "{} {}: expected a dependency {prefix}…, found \"{}\"",
                self.name, self.version, self.depends
            )
        })
    }

    /// Where it is once it is unpacked below `cache`.
    pub(crate) fn unpacked(&self, cache: &Path) -> Unpacked {
        let Self { name, version, .. } = self;
        Unpacked {
            name: name.clone(),
            version: version.clone(),
            root: cache.join(format!("{name}_{}", version.replace([':', '/'], "-"))),
        }
    }
}

/// Rounds of installing after which packages that drive each other out are given up.
const ROUNDS: usize = 3;

/// Installs those of `names` that are missing, system-wide, as root or through sudo.
pub(crate) fn ensure(names: &[&str]) -> Result<()> {
    for _ in 0..ROUNDS {
        let missing: Vec<&str> = names.iter().copied().filter(|name| !installed(name)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        // Another version of one of them, from other sources, may not go with what is missing, and apt removes it then:
        // the next round installs the one that does.
        install(&missing)?;
    }
    let missing: Vec<&str> = names.iter().copied().filter(|name| !installed(name)).collect();
    ensure!(
        missing.is_empty(),
        "expected {} to be installed together, still missing: {}",
        names.join(", "),
        missing.join(", ")
    );
    Ok(())
}

fn install(missing: &[&str]) -> Result<()> {
    need_debian(missing)?;
    print_status(format_args!("installing {}", missing.join(" ")));
    let install = || {
        let mut command = as_root("apt-get");
        command
            .args(["install", "--yes", "--quiet", "--no-install-recommends"])
            .args(missing);
        command.env("DEBIAN_FRONTEND", "noninteractive");
        output(&mut command).context(NEEDS_ROOT)
    };
    if install().is_err() {
        update()?;
        install()?;
    }
    Ok(())
}

/// What the index offers of a package. Updates the index if it does not know the name.
pub(crate) fn candidate(name: &str) -> Result<Candidate> {
    need_debian(&[name])?;
    match show(name) {
        Ok(candidate) => Ok(candidate),
        Err(_) => {
            update()?;
            show(name)
        }
    }
}

/// Downloads a package and unpacks it below `cache`, which keeps it: a second call does nothing.
pub(crate) fn unpack(candidate: &Candidate, cache: &Path) -> Result<Unpacked> {
    let wanted = candidate.unpacked(cache);
    download(&wanted)?;
    Ok(wanted)
}

/// Brings a package that is known to where it shall be, unless it is there.
pub(crate) fn download(wanted: &Unpacked) -> Result<()> {
    let Unpacked { name, version, root } = wanted;
    if root.is_dir() {
        return Ok(());
    }
    let cache = root.parent().context("a package is unpacked in a folder")?;
    print_status(format_args!("downloading {name} {version}"));
    std::fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let work = tempfile::tempdir_in(cache).with_context(|| format!("cannot write to {}", cache.display()))?;
    output(
        Command::new("apt-get")
            .args(["download", &format!("{name}={version}")])
            .current_dir(work.path()),
    )?;
    let files = work.path().join("files");
    for entry in std::fs::read_dir(work.path())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            output(Command::new("dpkg-deb").arg("--extract").arg(path).arg(&files))?;
        }
    }
    std::fs::rename(&files, root).with_context(|| format!("{name} {version}: nothing was downloaded"))
}

/// Brings the package index up to date.
pub(crate) fn update() -> Result<()> {
    print_status("updating the package index");
    let updated = output(as_root("apt-get").args(["update", "--quiet"]));
    updated.map(|_| ()).context(NEEDS_ROOT)
}

fn show(name: &str) -> Result<Candidate> {
    let text = output(Command::new("apt-cache").args(["show", "--no-all-versions", name]))?;
    let field = |key: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
        line.map(str::to_owned)
    };
    let version = field("Version").with_context(|| format!("the package index has no version of {name}"))?;
    Ok(Candidate {
        name: name.to_owned(),
        version,
        depends: field("Depends").unwrap_or_default(),
    })
}

fn installed(name: &str) -> bool {
    output(Command::new("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", name]))
        .is_ok_and(|status| status == "installed")
}

/// One error that says what is missing, where there is no apt of Debian 12.
fn need_debian(wanted: &[&str]) -> Result<()> {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    match foreign(&release) {
        None => Ok(()),
        Some(system) => {
            bail!(
                "set-up needs Debian 12 (apt) for the packages {}; this is \"{system}\"",
                wanted.join(" ")
            )
        }
    }
}

/// The system's name by its os-release(5), if it is not Debian 12 or later.
fn foreign(release: &str) -> Option<String> {
    let field = |key: &str| {
        let value = release
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        value.unwrap_or_default().trim_matches('"').to_owned()
    };
    let (id, version) = (field("ID"), field("VERSION_ID"));
    // Debian's testing has no version.
    let old = version.parse::<u32>().is_ok_and(|version| version < 12);
    let name = [id.as_str(), version.as_str()].join(" ");
    (id != "debian" || old).then(|| name.trim().to_owned())
}

fn as_root(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.args(["--", program]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_12_and_later_will_do() {
        let release = |id: &str, version: &str| format!("NAME=\"x\"\nID={id}\nVERSION_ID=\"{version}\"\n");
        assert_eq!(foreign(&release("debian", "12")), None);
        assert_eq!(foreign(&release("debian", "13")), None);
        assert_eq!(foreign("ID=debian\n"), None);
        assert_eq!(foreign(&release("debian", "11")), Some("debian 11".to_owned()));
        assert_eq!(foreign(&release("fedora", "43")), Some("fedora 43".to_owned()));
        assert_eq!(foreign(""), Some(String::new()));
    }

    #[test]
    fn a_dependency_is_found_by_its_prefix() {
        let depends = "libc6 (>= 2.36), linux-image-6.1.0-1-cloud-amd64 (= 6.1.1-1)";
        let package = Candidate {
            name: "meta".to_owned(),
            version: "1".to_owned(),
            depends: depends.to_owned(),
        };
        assert_eq!(
            package.dependency("linux-image-").unwrap(),
            "linux-image-6.1.0-1-cloud-amd64"
        );
        let error = package.dependency("qemu-").unwrap_err().to_string();
        assert!(error.contains("expected a dependency qemu-"), "{error}");
    }
}
