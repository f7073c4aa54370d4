//! Firecracker's configuration file.

use std::cmp::Reverse;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use api::RateLimiter;
use devices::Limits;
use devices::virtio::block::{self, CacheMode, IoEngine};
use devices::virtio::net::{MacAddress, TapSource};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::harmless::{self, or_default};
use super::limits::updated_limits;
use super::{ConfigError, RequestedConfig};
use crate::machine::{BalloonConfig, ConsoleConfig, DiskConfig, NetConfig, VsockConfig};

/// The most bytes of a configuration file.
const MAX_LEN: u64 = 1 << 20;

/// Reads the file, which may be a pipe, to its end.
fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?
        .take(MAX_LEN + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > MAX_LEN {
        let message = format!("expected at most {MAX_LEN} bytes, got more");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(text)
}

impl RequestedConfig {
    /// What a configuration file asks for.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = read(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        let mut file: FirecrackerFile = serde_json::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.into(),
            source,
        })?;
        let root = put_root_first(&mut file.drives)?;
        let machine = file.machine_config.as_ref();
        Ok(Self {
            kernel: Some(file.boot_source.kernel_image_path),
            initrd: file.boot_source.initrd_path,
            cmdline: file.boot_source.boot_args,
            root,
            cpus: machine.map(|machine| machine.vcpu_count),
            memory: machine.map(|machine| machine.mem_size_mib.saturating_mul(1 << 20)),
            shared_memory: false,
            huge_pages: machine.is_some_and(|machine| machine.huge_pages == HugePagesSection::Two),
            prealloc: false,
            dirty_ring: false,
            cpu_template: machine
                .and_then(|machine| machine.cpu_template.clone())
                .filter(|template| template != NO_TEMPLATE),
            disks: file.drives.into_iter().map(DiskConfig::from).collect(),
            nets: file.network_interfaces.into_iter().map(NetConfig::from).collect(),
            balloon: file.balloon.map(BalloonConfig::from),
            vsock: file.vsock.map(VsockConfig::from),
            rng_limits: file
                .entropy
                .map(|entropy| updated_limits(entropy.rate_limiter, Limits::default())),
            console: ConsoleConfig::default(),
        })
    }
}

/// What Firecracker calls no CPU template.
const NO_TEMPLATE: &str = "None";

/// As Firecracker does: the root disk becomes the first one, and so `/dev/vda` to Linux. Returns the kernel's words for
/// it, if there is one.
fn put_root_first(drives: &mut [DriveSection]) -> Result<Option<String>, ConfigError> {
    drives.sort_by_key(|drive| Reverse(drive.is_root_device));
    let mut roots = drives.iter().filter(|drive| drive.is_root_device);
    let (first, second) = (roots.next(), roots.next());
    if let (Some(first), Some(second)) = (first, second) {
        return Err(ConfigError::TwoRoots(
            first.drive_id.clone(),
            second.drive_id.clone(),
        ));
    }
    Ok(first.map(|drive| {
        let device = match &drive.partuuid {
            Some(partuuid) => format!("PARTUUID={partuuid}"),
            None => "/dev/vda".into(),
        };
        let mode = if drive.is_read_only { "ro" } else { "rw" };
        format!("root={device} {mode}")
    }))
}

/// Firecracker's configuration file, as far as it is served. Unknown keys are errors, not silence; what is known and
/// not served is [`harmless`] or an error too.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FirecrackerFile {
    boot_source: BootSourceSection,
    machine_config: Option<MachineSection>,
    #[serde(default, deserialize_with = "or_default")]
    drives: Vec<DriveSection>,
    #[serde(default, deserialize_with = "or_default")]
    network_interfaces: Vec<NetworkSection>,
    balloon: Option<BalloonSection>,
    vsock: Option<VsockSection>,
    entropy: Option<EntropySection>,
    #[serde(rename = "logger")]
    _logger: Option<LoggerSection>,
    #[serde(default, rename = "metrics", deserialize_with = "harmless::metrics")]
    _metrics: (),
    #[serde(default, rename = "mmds-config", deserialize_with = "harmless::mmds_config")]
    _mmds_config: (),
    /// The version of the service that `mmds-config` would configure.
    #[serde(rename = "mmds-version")]
    _mmds_version: Option<String>,
    #[serde(default, rename = "cpu-config", deserialize_with = "harmless::cpu_config")]
    _cpu_config: (),
    #[serde(default, rename = "pmem", deserialize_with = "harmless::pmem")]
    _pmem: (),
    #[serde(
        default,
        rename = "memory-hotplug",
        deserialize_with = "harmless::memory_hotplug"
    )]
    _memory_hotplug: (),
    #[serde(default, rename = "serial", deserialize_with = "harmless::serial")]
    _serial: (),
}

/// The logger's section. What it may ask for is so anyway; the forms of log lines are taken and have no effect.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LoggerSection {
    #[serde(default, rename = "log_path", deserialize_with = "harmless::log_path")]
    _log_path: (),
    #[serde(default, rename = "level", deserialize_with = "harmless::level")]
    _level: (),
    #[serde(rename = "show_level")]
    _show_level: Option<bool>,
    #[serde(rename = "show_log_origin")]
    _show_log_origin: Option<bool>,
    #[serde(default, rename = "module", deserialize_with = "harmless::module")]
    _module: (),
    // Keys of older versions.
    #[serde(default, rename = "log_fifo", deserialize_with = "harmless::log_fifo")]
    _log_fifo: (),
    #[serde(default, rename = "metrics_fifo", deserialize_with = "harmless::metrics_fifo")]
    _metrics_fifo: (),
    #[serde(default, rename = "options", deserialize_with = "harmless::options")]
    _options: (),
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
    #[serde(default, deserialize_with = "or_default")]
    huge_pages: HugePagesSection,
    #[serde(default, rename = "smt", deserialize_with = "harmless::smt")]
    _smt: (),
    /// `smt` in older versions.
    #[serde(default, rename = "ht_enabled", deserialize_with = "harmless::ht_enabled")]
    _ht_enabled: (),
    /// A guest's writes can always be logged, and are only while a migration or a snapshot needs the log.
    #[serde(rename = "track_dirty_pages")]
    _track_dirty_pages: Option<bool>,
    #[serde(
        default,
        rename = "gdb_socket_path",
        deserialize_with = "harmless::gdb_socket_path"
    )]
    _gdb_socket_path: (),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
enum HugePagesSection {
    #[default]
    None,
    /// Memory is in transparent huge pages anyway, where the host gives them.
    Transparent,
    #[serde(rename = "2M")]
    Two,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DriveSection {
    drive_id: String,
    /// What the file is; Firecracker's files do not have this key.
    #[serde(default)]
    format: FormatSection,
    /// The image's backing files, from the upper to the lower. Firecracker's files do not have this key.
    #[serde(default)]
    backing: Vec<BackingSection>,
    path_on_host: PathBuf,
    #[serde(default, deserialize_with = "or_default")]
    is_read_only: bool,
    #[serde(default, deserialize_with = "or_default")]
    is_root_device: bool,
    /// The root's partition, where it is not the whole disk.
    partuuid: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    rate_limiter: RateLimiter,
    #[serde(default, deserialize_with = "or_default")]
    cache_type: CacheSection,
    #[serde(default, deserialize_with = "or_default")]
    io_engine: EngineSection,
    #[serde(default, rename = "socket", deserialize_with = "harmless::socket")]
    _socket: (),
}

/// What a disk's file is.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FormatSection {
    #[default]
    Raw,
    Qcow2,
}

impl From<FormatSection> for block::ImageFormat {
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

impl From<CacheSection> for CacheMode {
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

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonSection {
    amount_mib: u64,
    deflate_on_oom: bool,
    /// The guest is asked for statistics when a client asks for them.
    #[serde(rename = "stats_polling_interval_s")]
    _stats_polling_interval_s: Option<u64>,
    /// The guest may always report which pages are free.
    #[serde(rename = "free_page_hinting")]
    _free_page_hinting: Option<bool>,
    #[serde(rename = "free_page_reporting")]
    _free_page_reporting: Option<bool>,
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
    /// Older versions' name for it, which has no effect.
    #[serde(rename = "vsock_id")]
    _vsock_id: Option<String>,
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

/// The entropy device's limits. The device is there without this section as well.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EntropySection {
    #[serde(default, deserialize_with = "or_default")]
    rate_limiter: RateLimiter,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkSection {
    iface_id: String,
    host_dev_name: String,
    #[serde(default, deserialize_with = "mac")]
    guest_mac: Option<MacAddress>,
    #[serde(default, deserialize_with = "or_default")]
    rx_rate_limiter: RateLimiter,
    #[serde(default, deserialize_with = "or_default")]
    tx_rate_limiter: RateLimiter,
    #[serde(default, rename = "mtu", deserialize_with = "harmless::mtu")]
    _mtu: (),
    /// A key of older versions.
    #[serde(
        default,
        rename = "allow_mmds_requests",
        deserialize_with = "harmless::allow_mmds_requests"
    )]
    _allow_mmds_requests: (),
}

/// Parses an address from text; [`MacAddress`] itself is deserialized from bytes.
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
            rx_limits: updated_limits(network.rx_rate_limiter, Limits::default()),
            tx_limits: updated_limits(network.tx_rate_limiter, Limits::default()),
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
            parameters: block::BlockParameters {
                limits: updated_limits(drive.rate_limiter, Limits::default()),
                cache: drive.cache_type.into(),
                direct: false,
                engine: drive.io_engine.into(),
            },
        }
    }
}
