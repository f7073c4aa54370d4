//! A machine's configuration: what the command line and the configuration file say, checked.
//!
//! The file is Firecracker's (`boot-source`, `machine-config`, `drives`, `network-interfaces`, `balloon`, `vsock`), so that
//! one file serves both.

mod file;

pub(crate) use file::LimitsSection;

use std::collections::BTreeSet;
use std::path::PathBuf;

use devices::virtio::block;
use devices::virtio::console::{Parameters, ParametersError};
use devices::virtio::net::{MAX_QUEUE_PAIRS, MacAddress, TapSource};
use devices::virtio::vsock::{CID_MAX, CID_MIN};
use devices::{BucketError, Limits};
use migration::MemoryKind;
use thiserror::Error;

use crate::boot::{BootSource, DEFAULT_CMDLINE, VIRTIO_CONSOLE_CMDLINE, layout};
use crate::cpu::{CpuError, Template};
use crate::machine::{BALLOON_ID, CONSOLE_ID, INSTANCE_PREFIX, RNG_ID, VSOCK_ID};
use crate::memory::{self, MemoryError};

/// Most vCPUs of a machine.
pub const MAX_CPUS: u8 = 32;
/// vCPUs of a machine whose configuration does not say.
pub const DEFAULT_CPUS: u8 = 1;
/// Memory of a machine whose configuration does not say, in bytes.
pub const DEFAULT_MEMORY: u64 = 512 << 20;
/// Most disks and network cards of a machine together: one slot is the entropy device's, and one each the balloon's, the
/// socket device's and the console's.
pub const MAX_DEVICES: usize = layout::VIRTIO_GSIS.len() - 1;
/// Names of other devices, which no disk and no network card can have.
const RESERVED_IDS: [&str; 4] = [RNG_ID, BALLOON_ID, VSOCK_ID, CONSOLE_ID];
/// Most bytes of a device's name: it is part of the name of the device's saved state.
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
    Ports(#[from] ParametersError),
    #[error("huge pages: expected no {0} beside them")]
    BesideHugePages(&'static str),
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
    /// An image or a block device.
    pub path: PathBuf,
    /// What the file is.
    pub format: block::Format,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// How it serves the guest.
    pub parameters: block::Parameters,
}

/// A network card of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Its name, unique in the machine, among disks as well.
    pub id: String,
    /// A tap of this host.
    pub tap: TapSource,
    /// Its address; a random one if none is given.
    pub mac: Option<MacAddress>,
    /// Pairs of queues, each of which is one of the tap's.
    pub queues: u16,
    /// What the guest may receive in a time.
    pub rx_limits: Limits,
    /// What it may send.
    pub tx_limits: Limits,
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

/// The console device of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleConfig {
    /// Whether it gets the input of the machine's terminal, and the serial port does not.
    pub has_terminal: bool,
    /// Names of its ports, and where programs on the host connect to them.
    pub ports: Vec<(String, PathBuf)>,
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
    /// What guest memory is made of.
    pub memory_kind: MemoryKind,
    /// Whether all of it is to be there before the guest starts.
    pub prealloc: bool,
    /// Whether vCPUs log their writes in rings, which tell who writes.
    pub dirty_ring: bool,
    /// CPU template.
    pub template: Template,
    /// Why this template, if it was chosen and not asked for.
    pub template_reason: Option<&'static str>,
    /// Disks in bus order.
    pub disks: Vec<DiskConfig>,
    /// Network cards in bus order, after the disks.
    pub nets: Vec<NetConfig>,
    /// The balloon, if there is to be one.
    pub balloon: Option<BalloonConfig>,
    /// The socket device, if there is to be one.
    pub vsock: Option<VsockConfig>,
    /// The console device, if there is to be one.
    pub console: Option<ConsoleConfig>,
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
    /// Whether guest memory is to be in huge pages.
    pub huge_pages: bool,
    /// Whether all of it is to be there before the guest starts.
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
    /// Whether the terminal is to be a console device's, and the ports that this is to have.
    pub console: ConsoleConfig,
}

impl Wishes {
    /// These wishes, with `over` where it says something.
    pub fn overridden_by(self, over: Wishes) -> Self {
        Self {
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
            console: ConsoleConfig {
                has_terminal: over.console.has_terminal || self.console.has_terminal,
                ports: [self.console.ports, over.console.ports].concat(),
            },
        }
    }

    /// What the memory is made of. What a balloon gives up of huge pages would be anybody's, and not always to be had
    /// again.
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
    pub fn check(self) -> Result<Config, ConfigError> {
        let cpus = self.cpus.unwrap_or(DEFAULT_CPUS.into());
        let cpus = u8::try_from(cpus)
            .ok()
            .filter(|cpus| (1..=MAX_CPUS).contains(cpus))
            .ok_or(ConfigError::Cpus(cpus))?;
        let memory = self.memory.unwrap_or(DEFAULT_MEMORY);
        memory::check_size(memory)?;
        let memory_kind = self.memory_kind()?;
        let (template, template_reason) = match self.cpu_template {
            Some(name) => (name.parse()?, None),
            None => {
                let (template, reason) = Template::probe();
                (template, Some(reason))
            }
        };
        let vsock = self.vsock.map(VsockConfig::check).transpose()?;
        let console = self.console.check()?;
        let others = [vsock.is_some(), self.balloon.is_some(), console.is_some()];
        let others = others.into_iter().filter(|there| *there).count();
        let disks = self.disks.iter().map(|disk| disk.id.as_str());
        let nets = self.nets.iter().map(|net| net.id.as_str());
        check_device_ids(disks.chain(nets), MAX_DEVICES - others)?;
        let disks = self.disks.iter().map(|disk| (&disk.id, disk.parameters.limits));
        let nets = self.nets.iter();
        let nets = nets.flat_map(|net| [(&net.id, net.rx_limits), (&net.id, net.tx_limits)]);
        for (id, limits) in disks.chain(nets) {
            limits.check().map_err(|source| ConfigError::Limits {
                id: id.clone(),
                source,
            })?;
        }
        self.nets.iter().try_for_each(NetConfig::check)?;
        check_taps(self.nets.iter().map(|net| &net.tap))?;
        if let Some(BalloonConfig { bytes: got, .. }) = self.balloon
            && got > memory
        {
            return Err(ConfigError::Balloon { got, memory });
        }
        let default_cmdline = match &console {
            Some(ConsoleConfig {
                has_terminal: true, ..
            }) => VIRTIO_CONSOLE_CMDLINE,
            _ => DEFAULT_CMDLINE,
        };
        let boot = BootSource {
            kernel: self.kernel.ok_or(ConfigError::NoKernel)?,
            initrd: self.initrd,
            cmdline: self.cmdline.unwrap_or_else(|| default_cmdline.into()),
        };
        Ok(Config {
            boot,
            cpus,
            memory,
            memory_kind,
            prealloc: self.prealloc,
            dirty_ring: self.dirty_ring,
            template,
            template_reason,
            disks: self.disks,
            nets: self.nets,
            balloon: self.balloon,
            vsock,
            console,
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
        })
    }
}

impl ConsoleConfig {
    /// The device, if there is any use for one, with its ports checked.
    pub fn check(self) -> Result<Option<Self>, ConfigError> {
        let parameters = Parameters {
            has_terminal: self.has_terminal,
            ports: self.ports.iter().map(|(name, _)| name.clone()).collect(),
        };
        parameters.check()?;
        let wanted = self.has_terminal || !self.ports.is_empty();
        Ok(wanted.then_some(self))
    }
}

/// Whether devices, of which there may be so many, can have these names, all in one machine.
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

/// Whether each network card has a tap of its own: one that may have many queues would serve two.
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
    fn devices_have_distinct_names() {
        let disk = |id: &str| DiskConfig {
            id: id.into(),
            path: "x".into(),
            format: block::Format::Raw,
            read_only: false,
            parameters: block::Parameters::default(),
        };
        let twice = Wishes {
            disks: vec![disk("a"), disk("a")],
            ..wishes()
        };
        assert!(matches!(twice.check(), Err(ConfigError::DuplicateDevice(id)) if id == "a"));
        let net = |id: &str| NetConfig {
            id: id.into(),
            tap: TapSource::Name(format!("tap-{id}")),
            mac: None,
            queues: 1,
            rx_limits: Limits::default(),
            tx_limits: Limits::default(),
        };
        let of_both_kinds = Wishes {
            disks: vec![disk("a")],
            nets: vec![net("b"), net("a")],
            ..wishes()
        };
        assert!(matches!(of_both_kinds.check(), Err(ConfigError::DuplicateDevice(id)) if id == "a"));
        let many = Wishes {
            disks: vec![disk("a")],
            nets: (0..MAX_DEVICES)
                .map(|number| net(&format!("net{number}")))
                .collect(),
            ..wishes()
        };
        assert!(matches!(
            many.check(),
            Err(ConfigError::TooManyDevices { got: 13, .. })
        ));
        for bad in ["", "a/b", "rng", "vsock", &"x".repeat(DEVICE_ID_MAX + 1)] {
            let bad = Wishes {
                disks: vec![disk(bad)],
                ..wishes()
            };
            assert!(matches!(bad.check(), Err(ConfigError::DeviceId { .. })));
        }
        check_device_id(&"x".repeat(DEVICE_ID_MAX)).unwrap();
    }

    #[test]
    fn network_cards_have_distinct_taps_and_some_queues() {
        let net = |id: &str, tap: TapSource| NetConfig {
            id: id.into(),
            tap,
            mac: None,
            queues: 1,
            rx_limits: Limits::default(),
            tx_limits: Limits::default(),
        };
        let both = |one, other| Wishes {
            nets: vec![net("a", one), net("b", other)],
            ..wishes()
        };
        let (name, list) = (|name: &str| TapSource::Name(name.into()), TapSource::Descriptors);
        both(name("x"), name("y")).check().unwrap();
        both(name("x"), list(vec![3, 4])).check().unwrap();
        for shared in [
            both(name("x"), name("x")),
            both(list(vec![3, 4]), list(vec![5, 3])),
            both(list(vec![3, 3]), name("x")),
        ] {
            assert!(matches!(shared.check(), Err(ConfigError::SharedTap)));
        }
        for queues in [0, MAX_QUEUE_PAIRS + 1] {
            let mut wishes = both(name("x"), name("y"));
            wishes.nets[1].queues = queues;
            let error = wishes.check().unwrap_err().to_string();
            assert!(
                error.contains(&format!("\"b\": expected 1 to 16 queues, got {queues}")),
                "{error}"
            );
        }
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
            format: block::Format::Raw,
            read_only: false,
            parameters: block::Parameters::default(),
        };
        let full = Wishes {
            disks: (0..MAX_DEVICES).map(disk).collect(),
            ..with_cid(3)
        };
        let error = full.check().unwrap_err();
        assert_eq!(
            error.to_string(),
            "disks and network cards: expected at most 11, got 12"
        );
    }

    #[test]
    fn a_console_device_is_there_when_it_is_wanted() {
        let with = |has_terminal, ports: &[&str]| Wishes {
            console: ConsoleConfig {
                has_terminal,
                ports: ports.iter().map(|name| ((*name).into(), "x".into())).collect(),
            },
            ..wishes()
        };
        let none = with(false, &[]).check().unwrap();
        assert_eq!(
            (none.console, none.boot.cmdline.as_str()),
            (None, DEFAULT_CMDLINE)
        );
        let console = with(true, &[]).check().unwrap();
        assert!(console.console.is_some() && console.boot.cmdline == VIRTIO_CONSOLE_CMDLINE);
        let ports = with(false, &["a", "b"]).check().unwrap();
        assert_eq!(ports.console.unwrap().ports.len(), 2);
        assert_eq!(ports.boot.cmdline, DEFAULT_CMDLINE);
        assert!(matches!(
            with(false, &["a/b"]).check(),
            Err(ConfigError::Ports(_))
        ));
        assert!(matches!(
            with(false, &["a", "a"]).check(),
            Err(ConfigError::Ports(_))
        ));
    }

    #[test]
    fn huge_pages_are_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.json");
        let read = |huge_pages: &str| {
            let text = format!(
                r#"{{"boot-source": {{"kernel_image_path": "k"}},
                    "machine-config": {{"vcpu_count": 1, "mem_size_mib": 64, "huge_pages": "{huge_pages}"}}}}"#
            );
            std::fs::write(&path, text).unwrap();
            Wishes::from_file(&path)
        };
        let kind = |wishes: Wishes| wishes.check().map(|config| config.memory_kind);
        assert_eq!(kind(read("None").unwrap()).unwrap(), MemoryKind::Anonymous);
        assert_eq!(kind(read("2M").unwrap()).unwrap(), MemoryKind::HugePages);
        assert!(read("1G").is_err());
        let shared = Wishes {
            shared_memory: true,
            ..Default::default()
        };
        let error = kind(read("2M").unwrap().overridden_by(shared)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "huge pages: expected no shared memory beside them"
        );
        let balloon = Wishes {
            balloon: Some(BalloonConfig {
                bytes: 0,
                deflate_on_oom: true,
            }),
            ..Default::default()
        };
        let error = kind(read("2M").unwrap().overridden_by(balloon)).unwrap_err();
        assert!(matches!(error, ConfigError::BesideHugePages(_)));
    }

    #[test]
    fn the_command_line_overrides_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.json");
        std::fs::write(
            &path,
            r#"{"boot-source": {"kernel_image_path": "k", "boot_args": "quiet"},
                "machine-config": {"vcpu_count": 2, "mem_size_mib": 128},
                "drives": [{"drive_id": "root", "path_on_host": "d", "is_root_device": true,
                            "cache_type": "Unsafe", "io_engine": "Sync",
                            "rate_limiter": {"ops": {"size": 9, "refill_time": 100}}}],
                "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0",
                                        "guest_mac": "06:00:AC:10:00:02",
                                        "tx_rate_limiter": {"ops": {"size": 9, "refill_time": 100}}},
                                       {"iface_id": "eth1", "host_dev_name": "tap1"}],
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
        let nine = Limits {
            bandwidth: None,
            operations: Some(devices::Bucket {
                size: 9,
                one_time_burst: 0,
                refill_time_ms: 100,
            }),
        };
        let expected = block::Parameters {
            limits: nine,
            cache: block::Cache::Unsafe,
            direct: false,
            engine: block::IoEngine::Sync,
        };
        assert_eq!(config.disks[0].parameters, expected);
        let expected = [
            ("eth0", "tap0", Some("06:00:ac:10:00:02".parse().unwrap())),
            ("eth1", "tap1", None),
        ]
        .map(|(id, tap, mac)| NetConfig {
            id: id.into(),
            tap: TapSource::Name(tap.into()),
            mac,
            queues: 1,
            rx_limits: Limits::default(),
            tx_limits: if mac.is_some() { nine } else { Limits::default() },
        });
        assert_eq!(config.nets, expected);
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

        for (section, expected) in [
            (r#""mmds-config": {}"#, "unknown field `mmds-config`"),
            (
                r#""network-interfaces": [{"iface_id": "a", "host_dev_name": "b", "guest_mac": "c"}]"#,
                "MAC address: expected",
            ),
        ] {
            let text = format!(r#"{{"boot-source": {{"kernel_image_path": "k"}}, {section}}}"#);
            std::fs::write(&path, text).unwrap();
            let error = migration::chain(&Wishes::from_file(&path).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }
}
