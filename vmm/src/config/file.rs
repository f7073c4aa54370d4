//! Firecracker's configuration file.

use std::path::{Path, PathBuf};

use devices::virtio::block::{self, Cache, IoEngine};
use devices::virtio::net::{MacAddress, TapSource};
use devices::{Bucket, Limits};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::{BalloonConfig, ConfigError, ConsoleConfig, DiskConfig, NetConfig, VsockConfig, Wishes};

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
        let machine = file.machine_config.as_ref();
        Ok(Self {
            kernel: Some(file.boot_source.kernel_image_path),
            initrd: file.boot_source.initrd_path,
            cmdline: file.boot_source.boot_args,
            cpus: machine.map(|machine| machine.vcpu_count),
            memory: machine.map(|machine| machine.mem_size_mib.saturating_mul(1 << 20)),
            shared_memory: false,
            huge_pages: machine.is_some_and(|machine| machine.huge_pages == HugePages::Two),
            prealloc: false,
            dirty_ring: false,
            cpu_template: machine.and_then(|machine| machine.cpu_template.clone()),
            disks: file.drives.into_iter().map(DiskConfig::from).collect(),
            nets: file.network_interfaces.into_iter().map(NetConfig::from).collect(),
            balloon: file.balloon.map(BalloonConfig::from),
            vsock: file.vsock.map(VsockConfig::from),
            rng_limits: file
                .entropy
                .map(|entropy| entropy.rate_limiter.over(Limits::default())),
            console: ConsoleConfig::default(),
        })
    }
}

/// Firecracker's configuration file, as far as it is served. Unknown sections are errors, not silence.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    boot_source: BootSourceSection,
    machine_config: Option<MachineSection>,
    #[serde(default)]
    drives: Vec<DriveSection>,
    #[serde(default)]
    network_interfaces: Vec<NetworkSection>,
    balloon: Option<BalloonSection>,
    vsock: Option<VsockSection>,
    entropy: Option<EntropySection>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BootSourceSection {
    kernel_image_path: PathBuf,
    initrd_path: Option<PathBuf>,
    boot_args: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineSection {
    vcpu_count: u64,
    mem_size_mib: u64,
    cpu_template: Option<String>,
    #[serde(default)]
    huge_pages: HugePages,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
enum HugePages {
    #[default]
    None,
    #[serde(rename = "2M")]
    Two,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DriveSection {
    drive_id: String,
    /// Firecracker's files have none.
    #[serde(default)]
    format: FormatSection,
    /// What an image is on, from the upper to the lower; as little Firecracker's.
    #[serde(default)]
    backing: Vec<BackingSection>,
    path_on_host: PathBuf,
    #[serde(default)]
    is_read_only: bool,
    #[serde(default)]
    #[expect(
        dead_code,
        reason = "Firecracker's files have it; the guest finds its root on the kernel command line here"
    )]
    is_root_device: bool,
    #[serde(default)]
    rate_limiter: LimitsSection,
    #[serde(default)]
    cache_type: CacheSection,
    #[serde(default)]
    io_engine: EngineSection,
}

/// What a disk's file is.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FormatSection {
    #[default]
    Raw,
    Qcow2,
}

impl From<FormatSection> for block::Format {
    fn from(section: FormatSection) -> Self {
        match section {
            FormatSection::Raw => Self::Raw,
            FormatSection::Qcow2 => Self::Qcow2,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BackingSection {
    path_on_host: PathBuf,
    format: Option<FormatSection>,
}

impl From<BackingSection> for block::BackingFile {
    fn from(section: BackingSection) -> Self {
        Self {
            path: section.path_on_host,
            format: section.format.map(Into::into),
        }
    }
}

/// Firecracker's own default is `Unsafe`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
enum CacheSection {
    #[default]
    Writeback,
    Unsafe,
}

impl From<CacheSection> for Cache {
    fn from(section: CacheSection) -> Self {
        match section {
            CacheSection::Writeback => Self::Writeback,
            CacheSection::Unsafe => Self::Unsafe,
        }
    }
}

/// Firecracker's own default is `Sync`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
enum EngineSection {
    #[default]
    Async,
    Sync,
}

impl From<EngineSection> for IoEngine {
    fn from(section: EngineSection) -> Self {
        match section {
            EngineSection::Async => Self::Async,
            EngineSection::Sync => Self::Sync,
        }
    }
}

/// Firecracker's `rate_limiter`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LimitsSection {
    bandwidth: Option<BucketSection>,
    ops: Option<BucketSection>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BucketSection {
    size: u64,
    #[serde(default)]
    one_time_burst: u64,
    /// In milliseconds.
    refill_time: u64,
}

impl LimitsSection {
    /// These limits where they say something, else `before`. A bucket of size 0 that takes no time to refill is no limit.
    pub(crate) fn over(self, before: Limits) -> Limits {
        let bucket = |section: Option<BucketSection>, before| match section {
            None => before,
            Some(BucketSection {
                size: 0,
                refill_time: 0,
                ..
            }) => None,
            Some(section) => Some(Bucket {
                size: section.size,
                one_time_burst: section.one_time_burst,
                refill_time_ms: section.refill_time,
            }),
        };
        Limits {
            bandwidth: bucket(self.bandwidth, before.bandwidth),
            operations: bucket(self.ops, before.operations),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonSection {
    amount_mib: u64,
    deflate_on_oom: bool,
    #[serde(default)]
    #[expect(
        dead_code,
        reason = "Firecracker's files may have it; here statistics are asked for when somebody wants to see them"
    )]
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

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct VsockSection {
    guest_cid: u64,
    uds_path: PathBuf,
    #[expect(dead_code, reason = "Firecracker's older files have it, for nothing")]
    vsock_id: Option<String>,
}

impl From<VsockSection> for VsockConfig<u64> {
    fn from(vsock: VsockSection) -> Self {
        Self {
            guest_cid: vsock.guest_cid,
            uds: vsock.uds_path,
            limits: Limits::default(),
        }
    }
}

/// The device is there without it as well.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EntropySection {
    #[serde(default)]
    rate_limiter: LimitsSection,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkSection {
    iface_id: String,
    host_dev_name: String,
    #[serde(default, deserialize_with = "mac")]
    guest_mac: Option<MacAddress>,
    #[serde(default)]
    rx_rate_limiter: LimitsSection,
    #[serde(default)]
    tx_rate_limiter: LimitsSection,
}

/// Text, where [`MacAddress`] itself is bytes.
fn mac<'de, D: Deserializer<'de>>(from: D) -> Result<Option<MacAddress>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    text.map(|text| text.parse().map_err(D::Error::custom))
        .transpose()
}

impl From<NetworkSection> for NetConfig {
    fn from(network: NetworkSection) -> Self {
        Self {
            id: network.iface_id,
            tap: TapSource::Name(network.host_dev_name),
            mac: network.guest_mac,
            queues: 1,
            rx_limits: network.rx_rate_limiter.over(Limits::default()),
            tx_limits: network.tx_rate_limiter.over(Limits::default()),
        }
    }
}

impl From<DriveSection> for DiskConfig {
    fn from(drive: DriveSection) -> Self {
        Self {
            id: drive.drive_id,
            path: drive.path_on_host,
            format: drive.format.into(),
            backing: drive.backing.into_iter().map(Into::into).collect(),
            read_only: drive.is_read_only,
            parameters: block::Parameters {
                limits: drive.rate_limiter.over(Limits::default()),
                cache: drive.cache_type.into(),
                direct: false,
                engine: drive.io_engine.into(),
            },
        }
    }
}
