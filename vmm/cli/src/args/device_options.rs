//! The options that name devices, and what is behind them on this host.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::Args;
use devices::Limits;
use devices::virtio::block::{BackingFile, BlockParameters, CacheModeError, ImageFormat, ImageFormatError};
use devices::virtio::net::{MacAddress, Tap, TapError, TapSource};
use vmm::config::{check_device_ids, check_taps};
use vmm::machine::{ConsoleConfig, DiskBackend, DiskConfig, HostOffer, MAX_DEVICES, NetConfig};

use super::{limits, vsock};

/// Devices of a machine that boots.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// A disk:
    /// [id=NAME,]path=FILE[,format=raw|qcow2][,backing=FILE[,backing-format=raw|qcow2]]...[,ro][,cache=writeback|writethrough|unsafe][,direct=on][,bandwidth=RATE][,iops=N];
    /// may be given several times. Each backing= is what the image before it is on, and is only read
    #[arg(long = "disk", value_name = "SPEC", value_parser = run_disk)]
    disks: Vec<RunDisk>,
    /// A network card: [id=NAME,]tap=TAP[,queues=N] or [id=NAME,]fd=N, each with [,mac=MAC][,bandwidth=RATE][,iops=N];
    /// may be given several times
    #[arg(long = "net", value_name = "SPEC", value_parser = run_net)]
    nets: Vec<RunNet>,
}

impl DeviceArgs {
    /// The disks; one without an id is named by its place.
    pub(crate) fn disks(&self) -> Vec<DiskConfig> {
        let config = |(index, disk): (usize, &RunDisk)| DiskConfig {
            id: disk.id.clone().unwrap_or_else(|| format!("disk{index}")),
            path: disk.path.clone(),
            format: disk.format,
            backing: disk.backing.clone(),
            read_only: disk.read_only,
            parameters: disk.parameters,
        };
        self.disks.iter().enumerate().map(config).collect()
    }

    /// The network cards, named likewise.
    pub(crate) fn nets(&self) -> Vec<NetConfig> {
        let config = |(index, net): (usize, &RunNet)| NetConfig {
            id: net.id.clone().unwrap_or_else(|| format!("net{index}")),
            tap: net.tap.clone(),
            mac: net.mac,
            queues: net.queues,
            rx_limits: net.limits,
            tx_limits: net.limits,
        };
        self.nets.iter().enumerate().map(config).collect()
    }
}

/// What this host has for the devices of a machine that comes from elsewhere.
#[derive(Debug, Args)]
pub(crate) struct BackendArgs {
    /// Backend of a disk of the machine:
    /// ID=PATH[,format=raw|qcow2][,backing=FILE[,backing-format=raw|qcow2]]...[,shared=on]; may be given several times.
    /// A disk that moves must be the one that the source has locked, or a new one (--with-disks); shared=on says that
    /// it is the source's where locks do not travel, as with block devices
    #[arg(long = "disk", value_name = "SPEC", value_parser = disk_backend)]
    disks: Vec<(String, DiskBackend)>,
    /// Tap of a network card of the machine, by name or by the descriptors of its queues (ID=fd:N, ID=fd:[N,M]); may be
    /// given several times
    #[arg(long = "net", value_name = "ID=TAP", value_parser = backend_tap)]
    nets: Vec<(String, TapSource)>,
    /// Unix socket of the machine's socket device here: uds=PATH
    #[arg(long, value_name = "SPEC", value_parser = vsock::receive)]
    vsock: Option<PathBuf>,
    /// Unix socket of a port of the machine's console here; may be given several times
    #[arg(long = "port", value_name = "NAME=PATH", value_parser = backend::<PathBuf>)]
    ports: Vec<(String, PathBuf)>,
}

impl BackendArgs {
    /// What is offered to that machine, with its taps opened.
    pub(crate) fn arrival(self, max_memory: Option<u64>, reserve: Option<u64>) -> anyhow::Result<HostOffer> {
        let disks = self.disks.iter().map(|(id, _)| id.as_str());
        let nets = self.nets.iter().map(|(id, _)| id.as_str());
        check_device_ids(disks.chain(nets), MAX_DEVICES)?;
        let console = ConsoleConfig {
            has_terminal: false,
            ports: self.ports,
        };
        let console = console.check()?;
        check_taps(self.nets.iter().map(|(_, tap)| tap))?;
        Ok(HostOffer {
            disks: self.disks.into_iter().collect(),
            nets: self
                .nets
                .into_iter()
                .map(|(id, tap)| Ok((id, Tap::open(&tap)?)))
                .collect::<Result<_, TapError>>()?,
            vsock: self.vsock,
            ports: console.into_iter().flat_map(|console| console.ports).collect(),
            max_memory,
            reserve,
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct RunDisk {
    id: Option<String>,
    path: PathBuf,
    format: ImageFormat,
    backing: Vec<BackingFile>,
    read_only: bool,
    parameters: BlockParameters,
}

const DISK: &str = "expected [id=NAME,]path=FILE[,format=raw|qcow2][,backing=FILE[,backing-format=raw|qcow2]]...[,ro][,cache=MODE][,direct=on|off][,bandwidth=RATE][,iops=N]";

fn run_disk(text: &str) -> Result<RunDisk, String> {
    let mut disk = RunDisk {
        id: None,
        path: PathBuf::new(),
        format: ImageFormat::default(),
        backing: Vec::new(),
        read_only: false,
        parameters: BlockParameters::default(),
    };
    for part in text.split(',') {
        if limits::parse_part(&mut disk.parameters.limits, part)? || parse_backing(&mut disk.backing, part)? {
            continue;
        }
        match part.split_once('=') {
            Some(("id", id)) => disk.id = Some(id.into()),
            Some(("path", path)) => disk.path = path.into(),
            Some(("format", format)) => {
                disk.format = format
                    .parse()
                    .map_err(|error: ImageFormatError| error.to_string())?;
            }
            Some(("cache", mode)) => {
                disk.parameters.cache = mode.parse().map_err(|error: CacheModeError| error.to_string())?;
            }
            Some(("direct", "on")) => disk.parameters.direct = true,
            Some(("direct", "off")) => disk.parameters.direct = false,
            None if part == "ro" => disk.read_only = true,
            _ => return Err(format!("{DISK}, got {part:?}")),
        }
    }
    if disk.path.as_os_str().is_empty() {
        return Err(format!("{DISK}, got no path"));
    }
    Ok(disk)
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct RunNet {
    id: Option<String>,
    tap: TapSource,
    mac: Option<MacAddress>,
    queues: u16,
    limits: Limits,
}

const NET: &str =
    "expected [id=NAME,]tap=TAP[,queues=N] or [id=NAME,]fd=N, with [,mac=MAC][,bandwidth=RATE][,iops=N]";

fn run_net(text: &str) -> Result<RunNet, String> {
    let (mut id, mut tap, mut mac, mut queues) = (None, None, None, None);
    let mut limits = Limits::default();
    for part in parts(text) {
        if limits::parse_part(&mut limits, part)? {
            continue;
        }
        match part.split_once('=') {
            Some(("id", name)) => id = Some(name.into()),
            Some(("tap", name)) if tap.is_none() && !name.is_empty() => {
                tap = Some(TapSource::Name(name.into()));
            }
            Some(("fd", list)) if tap.is_none() => tap = Some(TapSource::Descriptors(descriptors(list)?)),
            Some(("mac", text)) => mac = Some(text.parse().map_err(|error| format!("{error}"))?),
            Some(("queues", count)) => {
                queues = Some(count.parse().map_err(|_| format!("{NET}, got {part:?}"))?);
            }
            _ => return Err(format!("{NET}, got {part:?}")),
        }
    }
    let tap = tap.ok_or_else(|| format!("{NET}, got no tap"))?;
    let queues = match (&tap, queues) {
        (TapSource::Name(_), queues) => queues.unwrap_or(1),
        // However many too many: refused by their number later.
        (TapSource::Descriptors(list), None) => u16::try_from(list.len()).unwrap_or(u16::MAX),
        (TapSource::Descriptors(_), Some(_)) => {
            return Err("expected a descriptor for each queue, as fd=[3,4], got queues= as well".into());
        }
    };
    Ok(RunNet {
        id,
        tap,
        mac,
        queues,
        limits,
    })
}

fn backend_tap(text: &str) -> Result<(String, TapSource), String> {
    let (id, tap): (_, String) = backend(text)?;
    Ok((
        id,
        match tap.strip_prefix("fd:") {
            Some(list) => TapSource::Descriptors(descriptors(list)?),
            None => TapSource::Name(tap),
        },
    ))
}

/// `3`, or several: `[3,4]`.
fn descriptors(text: &str) -> Result<Vec<RawFd>, String> {
    let list = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
        .unwrap_or(text);
    let number = |part: &str| {
        // The first three are the terminal's.
        let number = part.parse().ok().filter(|number| *number > 2);
        number.ok_or_else(|| format!("expected a descriptor above 2, or some as [3,4], got {text:?}"))
    };
    list.split(',').map(number).collect()
}

/// The parts between commas, except for commas in brackets.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut open = false;
    text.split(move |letter| {
        open = letter == '[' || open && letter != ']';
        letter == ',' && !open
    })
}

/// Takes a part that is about what an image is on.
fn parse_backing(backing: &mut Vec<BackingFile>, part: &str) -> Result<bool, String> {
    match (part.split_once('='), backing.last_mut()) {
        (Some(("backing", path)), _) if !path.is_empty() => backing.push(BackingFile {
            path: path.into(),
            format: None,
        }),
        (Some(("backing-format", format)), Some(last)) if last.format.is_none() => {
            last.format = Some(
                format
                    .parse()
                    .map_err(|error: ImageFormatError| error.to_string())?,
            );
        }
        (Some(("backing" | "backing-format", _)), _) => {
            return Err(format!(
                "expected backing=FILE, and then backing-format=raw|qcow2, got {part:?}"
            ));
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Options follow the path, which may have commas of its own.
fn disk_backend(text: &str) -> Result<(String, DiskBackend), String> {
    const OPTIONS: [&str; 4] = ["format=", "backing=", "backing-format=", "shared="];
    let is_option = |part: &str| OPTIONS.iter().any(|option| part.starts_with(option));
    let (mut rest, mut options) = (text, Vec::new());
    while let Some((before, part)) = rest.rsplit_once(',').filter(|(_, part)| is_option(part)) {
        options.push(part);
        rest = before;
    }
    let (id, path) = backend(rest)?;
    let mut disk = DiskBackend {
        path,
        format: ImageFormat::default(),
        backing: Vec::new(),
        is_shared: false,
    };
    for part in options.into_iter().rev() {
        if parse_backing(&mut disk.backing, part)? {
            continue;
        }
        match part.split_once('=') {
            Some(("format", format)) => {
                disk.format = format
                    .parse()
                    .map_err(|error: ImageFormatError| error.to_string())?;
            }
            Some(("shared", "on")) => disk.is_shared = true,
            Some(("shared", "off")) => disk.is_shared = false,
            _ => return Err(format!("expected shared=on or shared=off, got {part:?}")),
        }
    }
    Ok((id, disk))
}

/// A name, and what is behind what has it.
pub(crate) fn backend<T: for<'a> From<&'a str>>(text: &str) -> Result<(String, T), String> {
    match text.split_once('=') {
        Some((id, backend)) if !id.is_empty() && !backend.is_empty() => Ok((id.into(), backend.into())),
        _ => Err(format!(
            "expected a name, '=' and what is behind it, got {text:?}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use devices::virtio::block::CacheMode;

    use super::*;
    use vmm::config::ConfigError;

    fn chain_of(files: &[(&str, Option<ImageFormat>)]) -> Vec<BackingFile> {
        let file = |(path, format): &(&str, _)| BackingFile {
            path: path.into(),
            format: *format,
        };
        files.iter().map(file).collect()
    }

    #[test]
    fn disks() {
        let disk = run_disk("id=root,path=/a b,ro").unwrap();
        assert_eq!(
            disk,
            RunDisk {
                id: Some("root".into()),
                path: "/a b".into(),
                format: ImageFormat::Raw,
                backing: Vec::new(),
                read_only: true,
                parameters: BlockParameters::default(),
            }
        );
        let limited = run_disk("path=x,bandwidth=10MB/s,iops=500").unwrap();
        let limits = limits::alone("bandwidth=10MB/s,iops=500").unwrap();
        assert_eq!(limited.parameters.limits, limits);
        let parameters = run_disk("path=x,direct=on,cache=unsafe").unwrap().parameters;
        assert!(parameters.direct);
        assert_eq!(parameters.cache, CacheMode::Unsafe);
        assert_eq!(
            run_disk("path=x,direct=off").unwrap().parameters,
            BlockParameters::default()
        );
        assert_eq!(
            run_disk("path=x,format=qcow2").unwrap().format,
            ImageFormat::Qcow2
        );
        for bad in [
            "path=x,format=vmdk",
            "path=x,cache=none",
            "path=x,direct=maybe",
            "path=x,iops=0",
        ] {
            assert!(run_disk(bad).is_err(), "{bad}");
        }
        let chain = run_disk("path=x,format=qcow2,backing=mid,backing-format=qcow2,backing=base,ro").unwrap();
        assert_eq!(
            chain.backing,
            chain_of(&[("mid", Some(ImageFormat::Qcow2)), ("base", None)])
        );
        for bad in [
            "path=x,backing=",
            "path=x,backing-format=raw",
            "path=x,backing=y,backing-format=raw,backing-format=raw",
        ] {
            assert!(run_disk(bad).unwrap_err().contains("backing=FILE"), "{bad}");
        }
        assert!(run_disk("id=x").unwrap_err().contains("no path"));
        assert!(run_disk("path=x,rw").unwrap_err().contains("\"rw\""));
    }

    #[test]
    fn nets() {
        let net = run_net("id=lan,tap=tap3,mac=02:00:00:00:00:07").unwrap();
        assert_eq!(
            net,
            RunNet {
                id: Some("lan".into()),
                tap: TapSource::Name("tap3".into()),
                mac: Some("02:00:00:00:00:07".parse().unwrap()),
                queues: 1,
                limits: Limits::default(),
            }
        );
        let net = run_net("tap=a,queues=4,bandwidth=1MB/s").unwrap();
        assert_eq!(net.queues, 4);
        assert_eq!(net.limits, limits::alone("bandwidth=1MB/s").unwrap());
        for (text, list) in [("fd=7", &[7][..]), ("fd=[3,4],id=x", &[3, 4])] {
            let net = run_net(text).unwrap();
            assert_eq!(net.tap, TapSource::Descriptors(list.into()));
            assert_eq!(usize::from(net.queues), list.len());
        }
        for (bad, word) in [
            ("id=x", "no tap"),
            ("tap=x,up", "\"up\""),
            ("tap=x,mac=ff:ff:ff:ff:ff:ff", "MAC address"),
            ("tap=x,tap=y", "\"tap=y\""),
            ("tap=x,queues=many", "\"queues=many\""),
            ("fd=2", "above 2"),
            ("fd=", "above 2"),
            ("fd=[3,x]", "[3,x]"),
            ("fd=[3,4],queues=2", "queues="),
            ("tap=x,bandwidth=0MB/s", "above 0"),
        ] {
            let error = run_net(bad).unwrap_err();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }

    #[test]
    fn devices_without_a_name_are_numbered() {
        let args = DeviceArgs {
            disks: vec![run_disk("path=a").unwrap(), run_disk("path=b").unwrap()],
            nets: vec![run_net("id=x,tap=a").unwrap(), run_net("tap=b").unwrap()],
        };
        assert_eq!(args.disks()[1].id, "disk1");
        assert_eq!(args.nets()[1].id, "net1");
    }

    #[test]
    fn backends_have_names_of_their_own() {
        assert!(backend::<String>("root").is_err());
        assert!(backend::<String>("root=").is_err());
        assert_eq!(
            backend_tap("a=fd:[3,4]").unwrap().1,
            TapSource::Descriptors(vec![3, 4])
        );
        assert!(backend_tap("a=fd:x").unwrap_err().contains("above 2"));
        assert!(disk_backend("root=x,format=vmdk").is_err());
        let (id, disk) =
            disk_backend("root=a,b,format=qcow2,backing=c,backing=d,backing-format=raw,shared=on").unwrap();
        assert_eq!((id.as_str(), disk.format), ("root", ImageFormat::Qcow2));
        assert_eq!(
            disk.backing,
            chain_of(&[("c", None), ("d", Some(ImageFormat::Raw))])
        );
        assert!(disk.is_shared);
        assert!(
            disk_backend("root=x,shared=maybe")
                .unwrap_err()
                .contains("shared=on")
        );
        assert_eq!(disk.path, PathBuf::from("a,b"));
        let args = |net: &str| BackendArgs {
            disks: vec![disk_backend("a=/dev/vda").unwrap()],
            nets: vec![backend_tap(net).unwrap()],
            vsock: None,
            ports: Vec::new(),
        };
        let refused = |net| args(net).arrival(None, None).unwrap_err();
        assert!(refused("a=tap0").downcast_ref::<ConfigError>().is_some());
        let ports = vec![backend("a=x").unwrap(), backend("a=y").unwrap()];
        let args = BackendArgs {
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            ports,
        };
        let twice = args.arrival(None, None).unwrap_err();
        assert!(
            matches!(twice.downcast_ref(), Some(ConfigError::Ports(_))),
            "{twice}"
        );
        // Refused before a source connects.
        let missing = refused("b=no-tap-here").to_string();
        assert!(missing.contains("ip tuntap add dev no-tap-here"), "{missing}");
    }
}
