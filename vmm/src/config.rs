//! A machine's configuration: what the command line and the configuration file say, checked.
//!
//! The file is Firecracker's (`boot-source`, `machine-config`, `drives`, `vsock`), so that one file serves both.

use std::path::{Path, PathBuf};

use devices::virtio::vsock::{CID_MAX, CID_MIN};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::boot::{BootSource, DEFAULT_CMDLINE, layout};
use crate::cpu::{CpuError, Template};
use crate::machine::{BALLOON_ID, INSTANCE_PREFIX, RNG_ID, VSOCK_ID};
use crate::memory::{self, MemoryError};

/// Most vCPUs of a machine.
pub const MAX_CPUS: u8 = 32;
/// vCPUs of a machine whose configuration does not say.
pub const DEFAULT_CPUS: u8 = 1;
/// Memory of a machine whose configuration does not say, in bytes.
pub const DEFAULT_MEMORY: u64 = 512 << 20;
/// Most disks of a machine: one slot is the entropy device's, and one each the balloon's and the socket device's.
pub const MAX_DISKS: usize = layout::VIRTIO_GSIS.len() - 1;
/// Names of other devices, which no disk can have.
const RESERVED_IDS: [&str; 3] = [RNG_ID, BALLOON_ID, VSOCK_ID];
/// Most bytes of a disk's name: it is part of the name of the disk's saved state.
const DISK_ID_MAX: usize = migration_state::MAX_NAME_LEN - INSTANCE_PREFIX.len();

/// A configuration that cannot be used.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum ConfigError {
    #[error("configuration file {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("configuration file {path}")]
    Parse {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("cpus: expected 1 to {MAX_CPUS}, got {0}")]
    Cpus(u64),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Template(#[from] CpuError),
    #[error("disks: expected at most {most}, got {got}")]
    TooManyDisks { most: usize, got: usize },
    #[error(
        "disk id {got:?}: expected 1 to {DISK_ID_MAX} letters, digits, '_' or '-', and none of {RESERVED_IDS:?}"
    )]
    DiskId { got: String },
    #[error("disk id {0:?} is used twice; name disks apart with id=")]
    DuplicateDisk(String),
    #[error("balloon: expected at most the guest's memory of {memory} bytes, got {got} bytes")]
    Balloon { got: u64, memory: u64 },
    #[error("vsock cid: expected {CID_MIN} to {CID_MAX}, got {0}")]
    Cid(u64),
    #[error("kernel: none given; use --kernel or a configuration file with a boot-source")]
    NoKernel,
}

/// A disk of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// Its name, unique in the machine.
    pub id: String,
    /// A raw image or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// A balloon of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonConfig {
    /// What the guest is to give up from the start, in bytes.
    pub bytes: u64,
    /// Whether it may take some of it back when it runs out of memory.
    pub deflate_on_oom: bool,
}

/// The socket device of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig<C = u32> {
    /// The guest's address.
    pub guest_cid: C,
    /// Where programs on the host connect.
    pub uds: PathBuf,
}

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// What to boot.
    pub boot: BootSource,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Whether guest memory is a memfd.
    pub shared_memory: bool,
    /// Whether vCPUs log their writes in rings, which tell who writes.
    pub dirty_ring: bool,
    /// CPU template.
    pub template: Template,
    /// Why this template, if it was chosen and not asked for.
    pub template_reason: Option<&'static str>,
    /// Disks in bus order.
    pub disks: Vec<DiskConfig>,
    /// The balloon, if there is to be one.
    pub balloon: Option<BalloonConfig>,
    /// The socket device, if there is to be one.
    pub vsock: Option<VsockConfig>,
}

/// What was asked for, before any check; `None` where nothing was said.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// Path of the kernel.
    pub kernel: Option<PathBuf>,
    /// Path of the initrd.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// Number of vCPUs.
    pub cpus: Option<u64>,
    /// Guest memory in bytes.
    pub memory: Option<u64>,
    /// Whether guest memory is to be a memfd.
    pub shared_memory: bool,
    /// Whether vCPUs are to log their writes in rings.
    pub dirty_ring: bool,
    /// Name of a CPU template.
    pub cpu_template: Option<String>,
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// A balloon.
    pub balloon: Option<BalloonConfig>,
    /// A socket device, with any number as the guest's address.
    pub vsock: Option<VsockConfig<u64>>,
}

impl Wishes {
    /// What a configuration file asks for.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        let file: File = serde_json::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.into(),
            source,
        })?;
        Ok(Self {
            kernel: Some(file.boot_source.kernel_image_path),
            initrd: file.boot_source.initrd_path,
            cmdline: file.boot_source.boot_args,
            cpus: file.machine_config.as_ref().map(|machine| machine.vcpu_count),
            memory: file
                .machine_config
                .as_ref()
                .map(|machine| machine.mem_size_mib.saturating_mul(1 << 20)),
            shared_memory: false,
            dirty_ring: false,
            cpu_template: file.machine_config.and_then(|machine| machine.cpu_template),
            disks: file.drives.into_iter().map(DiskConfig::from).collect(),
            balloon: file.balloon.map(BalloonConfig::from),
            vsock: file.vsock.map(VsockConfig::from),
        })
    }

    /// These wishes, with `over` where it says something.
    pub fn overridden_by(self, over: Wishes) -> Self {
        Self {
            kernel: over.kernel.or(self.kernel),
            initrd: over.initrd.or(self.initrd),
            cmdline: over.cmdline.or(self.cmdline),
            cpus: over.cpus.or(self.cpus),
            memory: over.memory.or(self.memory),
            shared_memory: over.shared_memory || self.shared_memory,
            dirty_ring: over.dirty_ring || self.dirty_ring,
            cpu_template: over.cpu_template.or(self.cpu_template),
            disks: [self.disks, over.disks].concat(),
            balloon: over.balloon.or(self.balloon),
            vsock: over.vsock.or(self.vsock),
        }
    }

    /// Checks everything that can be checked without building the machine.
    pub fn check(self) -> Result<Config, ConfigError> {
        let cpus = self.cpus.unwrap_or(DEFAULT_CPUS.into());
        let cpus = u8::try_from(cpus)
            .ok()
            .filter(|cpus| (1..=MAX_CPUS).contains(cpus))
            .ok_or(ConfigError::Cpus(cpus))?;
        let memory = self.memory.unwrap_or(DEFAULT_MEMORY);
        memory::check_size(memory)?;
        let (template, template_reason) = match self.cpu_template {
            Some(name) => (name.parse()?, None),
            None => {
                let (template, reason) = Template::probe();
                (template, Some(reason))
            }
        };
        let vsock = self.vsock.map(VsockConfig::check).transpose()?;
        let others = usize::from(vsock.is_some()) + usize::from(self.balloon.is_some());
        check_disks(&self.disks, MAX_DISKS - others)?;
        if let Some(BalloonConfig { bytes: got, .. }) = self.balloon
            && got > memory
        {
            return Err(ConfigError::Balloon { got, memory });
        }
        let boot = BootSource {
            kernel: self.kernel.ok_or(ConfigError::NoKernel)?,
            initrd: self.initrd,
            cmdline: self.cmdline.unwrap_or_else(|| DEFAULT_CMDLINE.into()),
        };
        Ok(Config {
            boot,
            cpus,
            memory,
            shared_memory: self.shared_memory,
            dirty_ring: self.dirty_ring,
            template,
            template_reason,
            disks: self.disks,
            balloon: self.balloon,
            vsock,
        })
    }
}

impl VsockConfig<u64> {
    fn check(self) -> Result<VsockConfig, ConfigError> {
        let guest_cid = u32::try_from(self.guest_cid)
            .ok()
            .filter(|cid| (CID_MIN..=CID_MAX).contains(cid))
            .ok_or(ConfigError::Cid(self.guest_cid))?;
        Ok(VsockConfig {
            guest_cid,
            uds: self.uds,
        })
    }
}

fn check_disks(disks: &[DiskConfig], most: usize) -> Result<(), ConfigError> {
    if disks.len() > most {
        let got = disks.len();
        return Err(ConfigError::TooManyDisks { most, got });
    }
    for (index, disk) in disks.iter().enumerate() {
        check_disk_id(&disk.id)?;
        if disks[..index].iter().any(|other| other.id == disk.id) {
            return Err(ConfigError::DuplicateDisk(disk.id.clone()));
        }
    }
    Ok(())
}

/// Whether a disk can have this name.
pub fn check_disk_id(id: &str) -> Result<(), ConfigError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    if id.is_empty() || id.len() > DISK_ID_MAX || !id.bytes().all(allowed) || RESERVED_IDS.contains(&id) {
        return Err(ConfigError::DiskId { got: id.into() });
    }
    Ok(())
}

/// Firecracker's configuration file, as far as it is served. Unknown sections are errors, not silence.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    boot_source: BootSourceSection,
    machine_config: Option<MachineSection>,
    #[serde(default)]
    drives: Vec<DriveSection>,
    balloon: Option<BalloonSection>,
    vsock: Option<VsockSection>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct BootSourceSection {
    kernel_image_path: PathBuf,
    initrd_path: Option<PathBuf>,
    boot_args: Option<String>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct MachineSection {
    vcpu_count: u64,
    mem_size_mib: u64,
    cpu_template: Option<String>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct DriveSection {
    drive_id: String,
    path_on_host: PathBuf,
    #[serde(default)]
    is_read_only: bool,
    /// Firecracker's files have it; the guest finds its root on the kernel command line here.
    #[serde(default)]
    is_root_device: bool,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct BalloonSection {
    amount_mib: u64,
    deflate_on_oom: bool,
    /// Firecracker's files may have it; here statistics are asked for when somebody wants to see them.
    #[serde(default)]
    stats_polling_interval_s: u64,
}

impl From<BalloonSection> for BalloonConfig {
    fn from(balloon: BalloonSection) -> Self {
        Self {
            bytes: balloon.amount_mib.saturating_mul(1 << 20),
            deflate_on_oom: balloon.deflate_on_oom,
        }
    }
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct VsockSection {
    guest_cid: u64,
    uds_path: PathBuf,
    /// Firecracker's older files have it, for nothing.
    vsock_id: Option<String>,
}

impl From<VsockSection> for VsockConfig<u64> {
    fn from(vsock: VsockSection) -> Self {
        Self {
            guest_cid: vsock.guest_cid,
            uds: vsock.uds_path,
        }
    }
}

impl From<DriveSection> for DiskConfig {
    fn from(drive: DriveSection) -> Self {
        Self {
            id: drive.drive_id,
            path: drive.path_on_host,
            read_only: drive.is_read_only,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wishes() -> Wishes {
        Wishes {
            kernel: Some("vmlinux".into()),
            memory: Some(64 << 20),
            ..Default::default()
        }
    }

    #[test]
    fn defaults_and_limits() {
        let config = wishes().check().unwrap();
        assert_eq!((config.cpus, config.memory), (1, 64 << 20));
        for bad in [0, 33, 1 << 40] {
            let error = Wishes {
                cpus: Some(bad),
                ..wishes()
            }
            .check()
            .unwrap_err();
            assert_eq!(error.to_string(), format!("cpus: expected 1 to 32, got {bad}"));
        }
        assert!(matches!(Wishes::default().check(), Err(ConfigError::NoKernel)));
    }

    #[test]
    fn a_balloon_is_no_larger_than_the_guest() {
        let with = |bytes| Wishes {
            balloon: Some(BalloonConfig {
                bytes,
                deflate_on_oom: true,
            }),
            ..wishes()
        };
        with(64 << 20).check().unwrap();
        assert!(matches!(
            with((64 << 20) + 1).check(),
            Err(ConfigError::Balloon { .. })
        ));
    }

    #[test]
    fn disks_have_distinct_names() {
        let disk = |id: &str| DiskConfig {
            id: id.into(),
            path: "x".into(),
            read_only: false,
        };
        let twice = Wishes {
            disks: vec![disk("a"), disk("a")],
            ..wishes()
        };
        assert!(matches!(twice.check(), Err(ConfigError::DuplicateDisk(id)) if id == "a"));
        for bad in ["", "a/b", "rng", "vsock", &"x".repeat(DISK_ID_MAX + 1)] {
            let bad = Wishes {
                disks: vec![disk(bad)],
                ..wishes()
            };
            assert!(matches!(bad.check(), Err(ConfigError::DiskId { .. })));
        }
        check_disk_id(&"x".repeat(DISK_ID_MAX)).unwrap();
    }

    #[test]
    fn addresses_that_no_guest_can_have() {
        let with_cid = |guest_cid| Wishes {
            vsock: Some(VsockConfig {
                guest_cid,
                uds: "v.sock".into(),
            }),
            ..wishes()
        };
        for bad in [0, 2, u64::from(u32::MAX), 1 << 32 | 3] {
            let error = with_cid(bad).check().unwrap_err();
            let expected = format!("vsock cid: expected 3 to 4294967294, got {bad}");
            assert_eq!(error.to_string(), expected);
        }
        with_cid(3).check().unwrap();
        let disk = |id| DiskConfig {
            id: format!("d{id}"),
            path: "x".into(),
            read_only: false,
        };
        let full = Wishes {
            disks: (0..MAX_DISKS).map(disk).collect(),
            ..with_cid(3)
        };
        let error = full.check().unwrap_err();
        assert_eq!(error.to_string(), "disks: expected at most 11, got 12");
    }

    #[test]
    fn the_command_line_overrides_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.json");
        std::fs::write(
            &path,
            r#"{"boot-source": {"kernel_image_path": "k", "boot_args": "quiet"},
                "machine-config": {"vcpu_count": 2, "mem_size_mib": 128},
                "drives": [{"drive_id": "root", "path_on_host": "d", "is_root_device": true}],
                "balloon": {"amount_mib": 16, "deflate_on_oom": false, "stats_polling_interval_s": 1},
                "vsock": {"guest_cid": 7, "uds_path": "v.sock"}}"#,
        )
        .unwrap();
        let file = Wishes::from_file(&path).unwrap();
        let config = file
            .overridden_by(Wishes {
                cpus: Some(4),
                ..Default::default()
            })
            .check()
            .unwrap();
        assert_eq!(
            (config.cpus, config.memory, config.boot.cmdline.as_str()),
            (4, 128 << 20, "quiet")
        );
        assert_eq!(config.disks[0].id, "root");
        let balloon = BalloonConfig {
            bytes: 16 << 20,
            deflate_on_oom: false,
        };
        assert_eq!(config.balloon, Some(balloon));
        let expected = VsockConfig {
            guest_cid: 7,
            uds: "v.sock".into(),
        };
        assert_eq!(config.vsock, Some(expected));

        std::fs::write(
            &path,
            r#"{"boot-source": {"kernel_image_path": "k"}, "mmds-config": {}}"#,
        )
        .unwrap();
        let error = migration::chain(&Wishes::from_file(&path).unwrap_err());
        assert!(error.contains("unknown field `mmds-config`"), "{error}");
    }
}
