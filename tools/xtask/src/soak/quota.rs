//! A share of the machine's CPU time for some programs: a control group with a quota, and stand-ins for the programs,
//! which enter the group before they become them.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread::{available_parallelism, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Of the group. There is one, so that the next run finds what a killed one has left.
const NAME: &str = "godwit-slow";
/// In which the quota is counted: the kernel's default.
const PERIOD_US: u64 = 100_000;
/// How long the last programs may take to leave the group.
const EMPTY_WITHIN: Duration = Duration::from_secs(10);

/// A control group, version 1 or 2, all of whose programs together have a share of the machine's CPU time. It is removed
/// when this is dropped; what is left of one that was not, as its owner was killed, the next one takes over.
pub(super) struct Quota {
    folder: PathBuf,
    version: CgroupVersion,
    /// Locked, which shows another run that the group has an owner.
    _lock: File,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CgroupVersion {
    V1,
    V2,
}

impl Quota {
    /// All programs of the group together have one part in `parts` of the CPU time of the machine.
    pub(super) fn one_in(parts: u64) -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("/proc/self/mounts")?;
        let (version, root) = hierarchy(&mounts).context(
            "expected a cgroup file system with the cpu controller (version 1 or 2) in /proc/self/mounts, got none",
        )?;
        let folder = root.join(NAME);
        if version == CgroupVersion::V2 {
            // Its groups have what it hands on.
            set(&root.join("cgroup.subtree_control"), "+cpu")?;
        }
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error)
                    .with_context(|| format!("cannot make the control group {}", folder.display()));
            }
            _ => {}
        }
        let lock = take(&folder)?;
        let quota = Self {
            folder,
            version,
            _lock: lock,
        };
        let cpus = available_parallelism().context("number of CPUs")?.get() as u64;
        let quota_us = cpus * PERIOD_US / parts;
        quota.limit(Some(quota_us))?;
        // Programs that a scenario runs as another user enter too, where the kernel lets them: not in version 2.
        let entry = quota.folder.join("cgroup.procs");
        fs::set_permissions(&entry, fs::Permissions::from_mode(0o666)).context("cgroup.procs")?;
        Ok(quota)
    }

    /// So many microseconds of CPU time in each period, or as many as there are.
    fn limit(&self, quota_us: Option<u64>) -> Result<()> {
        let limit = |none: &str| quota_us.map_or_else(|| none.to_owned(), |quota| quota.to_string());
        match self.version {
            CgroupVersion::V1 => {
                set(&self.folder.join("cpu.cfs_period_us"), &PERIOD_US.to_string())?;
                set(&self.folder.join("cpu.cfs_quota_us"), &limit("-1"))
            }
            CgroupVersion::V2 => set(
                &self.folder.join("cpu.max"),
                &format!("{} {PERIOD_US}", limit("max")),
            ),
        }
    }

    /// Writes a program at `path` that enters the group and becomes `program`. A process of another user,
    /// which may not enter, becomes `program` all the same, and so does one with the argument `free`.
    pub(super) fn stand_in(&self, path: &Path, program: &Path, free: &str) -> Result<()> {
        let (entry, program) = (quoted(&self.folder.join("cgroup.procs"))?, quoted(program)?);
        let script = format!(
            "#!/bin/sh\n\
             case \" $* \" in\n\
             *\" {free} \"*) ;;\n\
             *) {{ echo 0 > {entry}; }} 2> /dev/null || [ \"$(id -u)\" != 0 ] || exit 125 ;;\n\
             esac\n\
             exec {program} \"$@\"\n"
        );
        fs::write(path, script)
            .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
            .with_context(|| path.display().to_string())
    }

    /// For how long programs of the group had to wait for their share, and in all.
    pub(super) fn held_back(&self) -> Result<String> {
        fs::read_to_string(self.folder.join("cpu.stat")).context("cpu.stat")
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        // Programs of the last scenario may still be on their way out, which they do not find while they are held back.
        if let Err(error) = self.limit(None) {
            crate::workspace::print_status(format_args!("{error:#}"));
        }
        let begin = Instant::now();
        while let Err(error) = fs::remove_dir(&self.folder) {
            if begin.elapsed() > EMPTY_WITHIN {
                crate::workspace::print_status(format_args!(
                    "cannot remove {}: {error}",
                    self.folder.display()
                ));
                return;
            }
            sleep(Duration::from_millis(10));
        }
    }
}

/// The lock of a group in which there is no program.
fn take(folder: &Path) -> Result<File> {
    let lock = File::open(folder).with_context(|| folder.display().to_string())?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => bail!("{}: another `cargo xtask soak slow` runs", folder.display()),
        Err(TryLockError::Error(error)) => return Err(error).context("the lock of the control group"),
    }
    let left = fs::read_to_string(folder.join("cgroup.procs")).context("cgroup.procs")?;
    if !left.is_empty() {
        let left: Vec<_> = left.lines().collect();
        bail!(
            "programs of a run that was killed are still in {}: end processes {} first",
            folder.display(),
            left.join(", ")
        );
    }
    Ok(lock)
}

/// Where the controller of CPU time is: a mount of its own in version 1, the one mount of version 2 where it has it.
fn hierarchy(mounts: &str) -> Option<(CgroupVersion, PathBuf)> {
    let of_version = |version| {
        mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (folder, kind, options) = (PathBuf::from(words.next()?), words.next()?, words.next()?);
            let has_cpu = match version {
                CgroupVersion::V1 => kind == "cgroup" && options.split(',').any(|option| option == "cpu"),
                CgroupVersion::V2 => kind == "cgroup2" && has_controller(&folder),
            };
            has_cpu.then_some((version, folder))
        })
    };
    of_version(CgroupVersion::V1).or_else(|| of_version(CgroupVersion::V2))
}

fn has_controller(root: &Path) -> bool {
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    controllers.split_whitespace().any(|name| name == "cpu")
}

fn set(file: &Path, value: &str) -> Result<()> {
    fs::write(file, value).with_context(|| format!("cannot write {value:?} to {}", file.display()))
}

/// As a word of a shell's.
fn quoted(path: &Path) -> Result<String> {
    let text = path
        .to_str()
        .with_context(|| format!("{} is no UTF-8", path.display()))?;
    Ok(format!("'{}'", text.replace('\'', r"'\''")))
}

#[cfg(test)]
mod tests {
    use std::mem::ManuallyDrop;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_controller_is_found_in_version_1() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0\n\
                      cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0\n";
        assert_eq!(
            hierarchy(mounts),
            Some((CgroupVersion::V1, "/sys/fs/cgroup/cpu,cpuacct".into()))
        );
        assert_eq!(
            hierarchy("cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"),
            None
        );
    }

    #[test]
    fn the_controller_is_found_in_version_2_where_it_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let mounts = format!("cgroup2 {} cgroup2 rw,nsdelegate 0 0\n", folder.path().display());
        assert_eq!(hierarchy(&mounts), None);
        fs::write(folder.path().join("cgroup.controllers"), "cpuset cpu io\n").unwrap();
        assert_eq!(
            hierarchy(&mounts),
            Some((CgroupVersion::V2, folder.path().into()))
        );
    }

    #[test]
    fn a_stand_in_enters_the_group_and_becomes_the_program() {
        let folder = tempfile::tempdir().unwrap();
        let quota = ManuallyDrop::new(Quota {
            folder: folder.path().into(),
            version: CgroupVersion::V2,
            _lock: File::open(folder.path()).unwrap(),
        });
        let (entry, path) = (folder.path().join("cgroup.procs"), folder.path().join("stand-in"));
        quota.stand_in(&path, Path::new("/bin/echo"), "--free").unwrap();
        let run = |arguments: &[&str]| {
            fs::write(&entry, "").unwrap();
            let output = Command::new(&path).args(arguments).output().unwrap();
            let said = String::from_utf8(output.stdout).unwrap();
            (said, fs::read_to_string(&entry).unwrap())
        };
        assert_eq!(run(&["a b", "c"]), ("a b c\n".into(), "0\n".into()));
        assert_eq!(run(&["a", "--free", "b"]), ("a --free b\n".into(), String::new()));
    }

    #[test]
    fn a_path_is_one_word_of_the_shell() {
        assert_eq!(quoted(Path::new("/a b/it's")).unwrap(), r"'/a b/it'\''s'");
    }
}
