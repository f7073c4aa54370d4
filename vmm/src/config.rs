//! A machine's configuration: what the command line and the configuration file say, checked.
//!
//! The file is Firecracker's, so that one file serves both.

mod file;
mod harmless;
mod limits;
mod repeat;
#[cfg(test)]
mod tests;

pub(crate) use limits::updated_limits;

use std::collections::BTreeSet;
use std::path::PathBuf;

use devices::virtio::console::{ConsoleParameters, ConsoleParametersError};
use devices::virtio::net::{MAX_QUEUE_PAIRS, TapSource};
use devices::virtio::vsock::{CID_MAX, CID_MIN};
use devices::{BucketError, Limits};
use migration::MemoryKind;
use thiserror::Error;

use crate::boot::{BootSource, DEFAULT_CMDLINE, VIRTIO_CONSOLE_CMDLINE, cmdline};
use crate::cpu::{CpuError, Template};
use crate::machine::{
    BALLOON_ID, BalloonConfig, CONSOLE_ID, ConsoleConfig, DiskConfig, INSTANCE_PREFIX, MAX_CPUS, MAX_DEVICES,
    MachineConfig, NetConfig, RNG_ID, VSOCK_ID, VsockConfig,
};
use crate::memory::{self, MemoryError};

/// vCPUs of a machine whose configuration does not set their number.
pub const DEFAULT_CPUS: u8 = 1;
/// Memory of a machine whose configuration does not set it, in bytes.
pub const DEFAULT_MEMORY: u64 = 512 << 20;
/// Names of other devices, which no disk and no network card can have.
const RESERVED_IDS: [&str; 4] = [RNG_ID, BALLOON_ID, VSOCK_ID, CONSOLE_ID];
/// The most bytes of a device's name, which is part of the name of the device's saved state.
const DEVICE_ID_MAX: usize = migration_state::MAX_NAME_LEN - INSTANCE_PREFIX.len();

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
    #[error("disks and network cards: expected at most {most}, got {got}")]
    TooManyDevices { most: usize, got: usize },
    #[error(
        "device id {got:?}: expected 1 to {DEVICE_ID_MAX} letters, digits, '_' or '-', and none of {RESERVED_IDS:?}"
    )]
    DeviceId { got: String },
    #[error("drives: expected one with is_root_device at most, got {0:?} and {1:?}")]
    TwoRoots(String, String),
    #[error("device id {0:?} is used twice; name disks and network cards apart with id=")]
    DuplicateDevice(String),
    #[error("device {id:?}")]
    Limits { id: String, source: BucketError },
    #[error("network cards: expected a tap for each, got one of two")]
    SharedTap,
    #[error("network card {id:?}: expected 1 to {MAX_QUEUE_PAIRS} queues, got {got}")]
    Queues { id: String, got: u16 },
    #[error("balloon: expected at most the guest's memory of {memory} bytes, got {got} bytes")]
    Balloon { got: u64, memory: u64 },
    #[error(transparent)]
    Ports(#[from] ConsoleParametersError),
    #[error("huge pages: expected no {0} beside them")]
    BesideHugePages(&'static str),
    #[error("vsock cid: expected {CID_MIN} to {CID_MAX}, got {0}")]
    Cid(u64),
    #[error("network card {id:?}: expected a tap by its name beside --on-reset reboot, got descriptors")]
    TapOnce { id: String },
    #[error("network card {id:?}: random address")]
    RandomMac { id: String, source: std::io::Error },
    #[error("kernel: none given; use --kernel or a configuration file with a boot-source")]
    NoKernel,
}

/// A machine's configuration as the user asks for it, before any check; `None` where an option was not given.
#[derive(Clone, Debug, Default)]
pub struct RequestedConfig {
    /// Path of the kernel.
    pub kernel: Option<PathBuf>,
    /// Path of the initrd.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// Words about the root disk that are added to the kernel command line.
    pub root: Option<String>,
    /// Number of vCPUs.
    pub cpus: Option<u64>,
    /// Guest memory in bytes.
    pub memory: Option<u64>,
    /// Whether guest memory is to be a memfd.
    pub shared_memory: bool,
    /// Whether guest memory is to be in huge pages.
    pub huge_pages: bool,
    /// Whether all guest memory is to be resident before the guest starts.
    pub prealloc: bool,
    /// Whether vCPUs are to log their writes in rings.
    pub dirty_ring: bool,
    /// Name of a CPU template.
    pub cpu_template: Option<String>,
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// Network cards.
    pub nets: Vec<NetConfig>,
    /// A balloon.
    pub balloon: Option<BalloonConfig>,
    /// A socket device, with any number as the guest's address.
    pub vsock: Option<VsockConfig<u64>>,
    /// Limits of the entropy device.
    pub rng_limits: Option<Limits>,
    /// Whether a console device is to have the terminal, and which ports it is to have.
    pub console: ConsoleConfig,
}

impl RequestedConfig {
    /// This configuration, with what `over` asks for in place of it or, for devices, in addition.
    pub fn overridden_by(self, over: RequestedConfig) -> Self {
        let says_root = |line: &String| cmdline::has_key(line, "root");
        let own_root = self
            .root
            .filter(|_| !over.cmdline.as_ref().is_some_and(says_root));
        Self {
            root: over.root.or(own_root),
            kernel: over.kernel.or(self.kernel),
            initrd: over.initrd.or(self.initrd),
            cmdline: over.cmdline.or(self.cmdline),
            cpus: over.cpus.or(self.cpus),
            memory: over.memory.or(self.memory),
            shared_memory: over.shared_memory || self.shared_memory,
            huge_pages: over.huge_pages || self.huge_pages,
            prealloc: over.prealloc || self.prealloc,
            dirty_ring: over.dirty_ring || self.dirty_ring,
            cpu_template: over.cpu_template.or(self.cpu_template),
            disks: [self.disks, over.disks].concat(),
            nets: [self.nets, over.nets].concat(),
            balloon: over.balloon.or(self.balloon),
            vsock: over.vsock.or(self.vsock),
            rng_limits: over.rng_limits.or(self.rng_limits),
            console: ConsoleConfig {
                has_terminal: over.console.has_terminal || self.console.has_terminal,
                ports: [self.console.ports, over.console.ports].concat(),
            },
        }
    }

    /// What the memory is made of. A huge page that a balloon gives up could go to another process, and not be
    /// available when the guest wants it back.
    fn memory_kind(&self) -> Result<MemoryKind, ConfigError> {
        match (self.huge_pages, self.shared_memory) {
            (true, true) => Err(ConfigError::BesideHugePages("shared memory")),
            (true, false) if self.balloon.is_some() => Err(ConfigError::BesideHugePages("balloon")),
            (true, false) => Ok(MemoryKind::HugePages),
            (false, true) => Ok(MemoryKind::Shared),
            (false, false) => Ok(MemoryKind::Anonymous),
        }
    }

    /// Checks everything that can be checked without building the machine.
    pub fn check(self) -> Result<MachineConfig, ConfigError> {
        let cpus = self.checked_cpus()?;
        let memory = self.memory.unwrap_or(DEFAULT_MEMORY);
        memory::check_size(memory)?;
        let memory_kind = self.memory_kind()?;
        let (template, template_reason) = self.template()?;
        let vsock = self.vsock.clone().map(VsockConfig::check).transpose()?;
        let console = self.console.clone().check()?;
        let others = [vsock.is_some(), self.balloon.is_some(), console.is_some()];
        self.check_names(MAX_DEVICES - others.into_iter().filter(|there| *there).count())?;
        self.check_limits()?;
        self.nets.iter().try_for_each(NetConfig::check)?;
        check_taps(self.nets.iter().map(|net| &net.tap))?;
        if let Some(BalloonConfig { bytes: got, .. }) = self.balloon
            && got > memory
        {
            return Err(ConfigError::Balloon { got, memory });
        }
        let has_terminal = console.as_ref().is_some_and(|console| console.has_terminal);
        Ok(MachineConfig {
            boot: self.boot_source(has_terminal)?,
            cpus,
            memory,
            memory_kind,
            prealloc: self.prealloc,
            dirty_ring: self.dirty_ring,
            template,
            template_reason,
            rng_limits: self.rng_limits.unwrap_or_default(),
            disks: self.disks,
            nets: self.nets,
            balloon: self.balloon,
            vsock,
            console,
        })
    }

    fn checked_cpus(&self) -> Result<u8, ConfigError> {
        let cpus = self.cpus.unwrap_or(DEFAULT_CPUS.into());
        u8::try_from(cpus)
            .ok()
            .filter(|cpus| (1..=MAX_CPUS).contains(cpus))
            .ok_or(ConfigError::Cpus(cpus))
    }

    /// The template, and why this one if none was asked for.
    fn template(&self) -> Result<(Template, Option<&'static str>), ConfigError> {
        if let Some(name) = &self.cpu_template {
            return Ok((name.parse()?, None));
        }
        let (template, reason) = Template::probe();
        Ok((template, Some(reason)))
    }

    /// Checks the names of disks and network cards, of which there may be at most `most`.
    fn check_names(&self, most: usize) -> Result<(), ConfigError> {
        let disks = self.disks.iter().map(|disk| disk.id.as_str());
        let nets = self.nets.iter().map(|net| net.id.as_str());
        check_device_ids(disks.chain(nets), most)
    }

    fn check_limits(&self) -> Result<(), ConfigError> {
        let disks = self
            .disks
            .iter()
            .map(|disk| (disk.id.as_str(), disk.parameters.limits));
        let nets = self
            .nets
            .iter()
            .flat_map(|net| [net.rx_limits, net.tx_limits].map(|limits| (net.id.as_str(), limits)));
        let rng = self.rng_limits.map(|limits| (RNG_ID, limits));
        for (id, limits) in disks.chain(nets).chain(rng) {
            limits.check().map_err(|source| ConfigError::Limits {
                id: id.into(),
                source,
            })?;
        }
        Ok(())
    }

    fn boot_source(&self, has_terminal: bool) -> Result<BootSource, ConfigError> {
        let default = if has_terminal {
            VIRTIO_CONSOLE_CMDLINE
        } else {
            DEFAULT_CMDLINE
        };
        let asked = self.cmdline.as_deref().unwrap_or(default);
        Ok(BootSource {
            kernel: self.kernel.clone().ok_or(ConfigError::NoKernel)?,
            initrd: self.initrd.clone(),
            cmdline: cmdline::with_words(asked, self.root.as_deref().unwrap_or_default()),
        })
    }
}

impl NetConfig {
    fn check(&self) -> Result<(), ConfigError> {
        if !(1..=MAX_QUEUE_PAIRS).contains(&self.queues) {
            return Err(ConfigError::Queues {
                id: self.id.clone(),
                got: self.queues,
            });
        }
        Ok(())
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
            limits: self.limits,
        })
    }
}

impl ConsoleConfig {
    /// The console device, if one is asked for, with its ports checked.
    pub fn check(self) -> Result<Option<Self>, ConfigError> {
        let parameters = ConsoleParameters {
            has_terminal: self.has_terminal,
            ports: self.ports.iter().map(|(name, _)| name.clone()).collect(),
        };
        parameters.check()?;
        let wanted = self.has_terminal || !self.ports.is_empty();
        Ok(wanted.then_some(self))
    }
}

/// Whether devices can have these names, all in one machine, and are at most `most`.
pub fn check_device_ids<'a>(ids: impl Iterator<Item = &'a str>, most: usize) -> Result<(), ConfigError> {
    let mut seen = BTreeSet::new();
    for id in ids {
        check_device_id(id)?;
        if !seen.insert(id) {
            return Err(ConfigError::DuplicateDevice(id.into()));
        }
    }
    if seen.len() > most {
        let got = seen.len();
        return Err(ConfigError::TooManyDevices { most, got });
    }
    Ok(())
}

/// Whether each network card has a tap of its own. The kernel would not refuse a tap with many queues to a second card.
pub fn check_taps<'a>(taps: impl Iterator<Item = &'a TapSource>) -> Result<(), ConfigError> {
    let (mut names, mut descriptors) = (BTreeSet::new(), BTreeSet::new());
    for tap in taps {
        let new = match tap {
            TapSource::Name(name) => names.insert(name),
            TapSource::Descriptors(list) => list.iter().all(|descriptor| descriptors.insert(descriptor)),
        };
        if !new {
            return Err(ConfigError::SharedTap);
        }
    }
    Ok(())
}

fn check_device_id(id: &str) -> Result<(), ConfigError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    if id.is_empty() || id.len() > DEVICE_ID_MAX || !id.bytes().all(allowed) || RESERVED_IDS.contains(&id) {
        return Err(ConfigError::DeviceId { got: id.into() });
    }
    Ok(())
}
