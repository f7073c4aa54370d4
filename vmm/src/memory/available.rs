//! How much memory this process can still get: what the host has left, and what its cgroups leave it.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::MemoryError;

/// From here on a limit of a cgroup of version 1 means that there is none: the kernel shows the largest multiple of a page
/// then.
const UNLIMITED: u64 = 1 << 62;

/// Checks that this many bytes of guest memory are available, before a guest depends on them. What the kernel keeps for
/// files alone counts as available, and so does swap, for which a guest is slow but lives.
pub(super) fn check_available(size: u64) -> Result<(), MemoryError> {
    let Available { bytes, by } = available(Path::new("/")).map_err(MemoryError::Available)?;
    if size > bytes {
        return Err(MemoryError::NotAvailable { got: size, bytes, by });
    }
    Ok(())
}

/// Memory that this process can still get.
#[derive(Debug, PartialEq, Eq)]
struct Available {
    bytes: u64,
    /// What limits it: the host, or a cgroup.
    by: String,
}

/// What the host and all cgroups of this process leave it. `root` is the directory with `proc` and `sys`.
fn available(root: &Path) -> io::Result<Available> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo"))?;
    let kib = |key| value(&meminfo, key).map(|kib| kib.saturating_mul(1024));
    let memory = kib("MemAvailable:").ok_or_else(|| {
        io::Error::other(
            "/proc/meminfo: expected a line MemAvailable, found none (Linux 3.14 and later have it)",
        )
    })?;
    let swap = kib("SwapFree:").unwrap_or(0);
    let mut least = Available {
        bytes: memory.saturating_add(swap),
        by: "the host".into(),
    };
    // A system without cgroups has no limits either, and one that hides its files has none that can be known.
    let own = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    for (version, group) in own.lines().filter_map(membership) {
        let Some(mount) = mounts
            .lines()
            .filter_map(CgroupMount::parse)
            .find(|mount| mount.version == version)
        else {
            continue;
        };
        // A group may have no more than each of those that it is in.
        for directory in mount.groups(group) {
            let shown = Path::new("/").join(&directory);
            let left = match version {
                CgroupInterface::One => left_in_v1(&root.join(&directory)),
                CgroupInterface::Two => left_in_v2(&root.join(&directory), swap),
            };
            if let Some(bytes) = left.filter(|bytes| *bytes < least.bytes) {
                let by = format!("the cgroup {}", shown.display());
                least = Available { bytes, by };
            }
        }
    }
    Ok(least)
}

/// The version of a cgroup's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CgroupInterface {
    One,
    Two,
}

/// Which group a line of `/proc/self/cgroup` names, if it is about memory (cgroups(7)).
fn membership(line: &str) -> Option<(CgroupInterface, &str)> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, group) = (fields.next()?, fields.next()?);
    match controllers {
        "" => Some((CgroupInterface::Two, group)),
        list if list.split(',').any(|controller| controller == "memory") => {
            Some((CgroupInterface::One, group))
        }
        _ => None,
    }
}

/// Where a hierarchy of cgroups is.
struct CgroupMount<'a> {
    version: CgroupInterface,
    /// The group that is at the mount point.
    root: &'a str,
    point: &'a str,
}

impl<'a> CgroupMount<'a> {
    /// A line of `/proc/self/mountinfo` (proc(5)), if it is one of a hierarchy with memory in it.
    fn parse(line: &'a str) -> Option<Self> {
        let (mount, system) = line.split_once(" - ")?;
        let mut system = system.split(' ');
        let version = match (system.next()?, system.nth(1)) {
            ("cgroup2", _) => CgroupInterface::Two,
            ("cgroup", Some(options)) if options.split(',').any(|option| option == "memory") => {
                CgroupInterface::One
            }
            _ => return None,
        };
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        Some(Self { version, root, point })
    }

    /// The folders of a group and of those that it is in, from the innermost, relative to the file system's root.
    fn groups(&self, group: &str) -> Vec<PathBuf> {
        let below = Path::new(group).strip_prefix(self.root).unwrap_or(Path::new(""));
        // A group outside of what is mounted here is shown with "..": what can be seen is the mount point.
        let is_below = below
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        let below = if is_below { below } else { Path::new("") };
        let point = Path::new(self.point.trim_start_matches('/'));
        below
            .ancestors()
            .map(|part| point.join(part).components().collect())
            .collect()
    }
}

/// The bytes that a group of version 2 leaves; `None` where it has no limit.
/// (Documentation/admin-guide/cgroup-v2.rst)
fn left_in_v2(group: &Path, swap_free: u64) -> Option<u64> {
    let memory = room(group, "memory.max", "memory.current")?;
    let reclaimable = reclaimable(group, &["active_file", "inactive_file", "slab_reclaimable"]);
    let swap = room(group, "memory.swap.max", "memory.swap.current").unwrap_or(swap_free);
    Some(
        memory
            .saturating_add(reclaimable)
            .saturating_add(swap.min(swap_free)),
    )
}

/// The same of version 1, whose swap does not count: its limit is one of memory and swap together.
/// (Documentation/admin-guide/cgroup-v1/memory.rst)
fn left_in_v1(group: &Path) -> Option<u64> {
    let memory = room(group, "memory.limit_in_bytes", "memory.usage_in_bytes")?;
    Some(memory.saturating_add(reclaimable(group, &["total_active_file", "total_inactive_file"])))
}

/// The bytes that are left of a limit; `None` if there is none.
fn room(group: &Path, limit: &str, usage: &str) -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        // "max" is no number.
        fs::read_to_string(group.join(name)).ok()?.trim().parse().ok()
    };
    let limit = number(limit).filter(|limit| *limit < UNLIMITED)?;
    Some(limit.saturating_sub(number(usage)?))
}

/// Memory of a group that the kernel takes back before it kills a process.
fn reclaimable(group: &Path, keys: &[&str]) -> u64 {
    let text = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    keys.iter()
        .filter_map(|key| value(&text, key))
        .fold(0, u64::saturating_add)
}

/// The number behind a key at the beginning of a line.
fn value(text: &str, key: &str) -> Option<u64> {
    let mut fields = text.lines().map(str::split_whitespace);
    fields.find_map(|mut line| {
        (line.next() == Some(key))
            .then(|| line.next()?.parse().ok())
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A root with the given files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 1048576 kB\nSwapFree: 102400 kB\n",
    );

    #[test]
    fn a_host_without_cgroups_has_what_is_available_and_its_swap() {
        let found = available(root(&[MEMINFO]).path()).unwrap();
        assert_eq!((found.bytes, &*found.by), (1124 * MIB, "the host"));
        assert!(available(root(&[("proc/meminfo", "MemTotal: 1 kB\n")]).path()).is_err());
    }

    #[test]
    fn version_2_limits_on_every_level_count() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "0::/pod/vm\n"),
            (
                "proc/self/mountinfo",
                "30 20 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n",
            ),
            ("sys/fs/cgroup/pod/memory.max", "314572800\n"),
            ("sys/fs/cgroup/pod/memory.current", "104857600\n"),
            (
                "sys/fs/cgroup/pod/memory.stat",
                "anon 1\nactive_file 1048576\ninactive_file 2097152\nfile 9\n",
            ),
            ("sys/fs/cgroup/pod/memory.swap.max", "0\n"),
            ("sys/fs/cgroup/pod/memory.swap.current", "0\n"),
            ("sys/fs/cgroup/pod/vm/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/vm/memory.current", "4096\n"),
        ];
        let found = available(root(&files).path()).unwrap();
        assert_eq!(
            (found.bytes, &*found.by),
            (203 * MIB, "the cgroup /sys/fs/cgroup/pod")
        );
    }

    #[test]
    fn version_1_limits_count_and_its_largest_number_is_none() {
        let limited = |limit| {
            root(&[
                MEMINFO,
                ("proc/self/cgroup", "4:memory:/a\n3:cpu,cpuacct:/b\n0::/\n"),
                (
                    "proc/self/mountinfo",
                    "35 31 0:32 /a /cg/memory rw - cgroup cgroup rw,memory\n",
                ),
                ("cg/memory/memory.limit_in_bytes", limit),
                ("cg/memory/memory.usage_in_bytes", "1048576\n"),
                (
                    "cg/memory/memory.stat",
                    "inactive_file 5\ntotal_inactive_file 1048576\n",
                ),
            ])
        };
        let found = available(limited("5242880\n").path()).unwrap();
        assert_eq!((found.bytes, &*found.by), (5 * MIB, "the cgroup /cg/memory"));
        let found = available(limited("9223372036854771712\n").path()).unwrap();
        assert_eq!(&*found.by, "the host");
    }

    #[test]
    fn a_group_outside_of_what_is_mounted_counts_as_the_mount_point() {
        let mount = CgroupMount::parse("1 2 0:3 / /cg rw - cgroup2 none rw").unwrap();
        assert_eq!(mount.groups("/../../other"), [PathBuf::from("cg")]);
        assert_eq!(mount.groups("/a/b"), ["cg/a/b", "cg/a", "cg/"].map(PathBuf::from));
    }

    #[test]
    fn the_memory_of_this_host_is_found() {
        check_available(MIB).unwrap();
        let refused = check_available(1 << 60).unwrap_err().to_string();
        assert!(refused.starts_with("memory: expected at most "), "{refused}");
    }
}
