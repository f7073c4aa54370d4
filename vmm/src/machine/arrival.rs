//! What this host offers to a machine that arrives, and which of the machine's devices it cannot serve.
//!
//! Host paths come from the command line, never from the peer. The peer's descriptions are untrusted.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use devices::virtio::block::{self, Access, BackingFile, BlockBackend, BlockBackendError, BlockState};
use devices::virtio::console::{self, ConsoleState};
use devices::virtio::net::{NetState, Tap};
use devices::virtio::rng::RngState;
use devices::virtio::vsock::VsockState;
use migration::{DeviceDescription, Difference, OfferedDisks};
use migration_state::Record;

use super::backends::{CONSOLE_ID, RNG_ID, Unavailable, VSOCK_ID};
use super::blank::{Blank, BlankError};
use super::config::MAX_DEVICES;
use super::description;

/// What there is for a disk here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskBackend {
    /// An image or a block device.
    pub path: PathBuf,
    /// What the file is: the peer does not say.
    pub format: block::ImageFormat,
    /// The backing files of an image, from the upper to the lower.
    pub backing: Vec<BackingFile>,
    /// Whether the operator says that it is the source's own disk, where locks cannot show that.
    pub is_shared: bool,
}

impl DiskBackend {
    /// All of its files, and for each whether it is written to, if the disk is.
    fn files(&self, is_writable: bool) -> impl Iterator<Item = (&Path, bool)> {
        let backing = self.backing.iter().map(|file| (file.path.as_path(), false));
        [(self.path.as_path(), is_writable)].into_iter().chain(backing)
    }
}

/// What this host offers to a machine that arrives.
#[derive(Debug)]
pub struct HostOffer {
    /// Disks by name: host paths never come from the peer.
    pub disks: BTreeMap<String, DiskBackend>,
    /// Taps by the name of the network card. They are open long before a machine comes: it takes a bridge up to a
    /// second to see that, and it forwards nothing to them before.
    pub nets: BTreeMap<String, Tap>,
    /// Path of the socket device's socket.
    pub vsock: Option<PathBuf>,
    /// Paths of the sockets of the console's ports, by the port's name.
    pub ports: BTreeMap<String, PathBuf>,
    /// The most guest memory that a machine may have, in bytes.
    pub max_memory: Option<u64>,
    /// How much guest memory is made, and made resident, before a machine arrives, in bytes.
    pub reserve: Option<u64>,
}

impl HostOffer {
    /// A disk made anew for the device of this number, if that is what it needs: its content comes along, and there is
    /// nothing at the path that is to be its own.
    pub(super) fn blank(
        &self,
        index: usize,
        device: &DeviceDescription,
        offered: Option<&OfferedDisks>,
    ) -> Result<Option<Blank>, BlankError> {
        let disk = self.disks.get(&device.id);
        // What is made is a raw image.
        let wanted = |disk: &&DiskBackend| {
            let is_raw_disk = device.kind == BlockState::KIND && disk.format == block::ImageFormat::Raw;
            offered.is_some_and(|disks| disks.come)
                && is_raw_disk
                && disk.path.symlink_metadata().is_err_and(is_nothing)
        };
        let Some(DiskBackend { path, .. }) = disk.filter(wanted) else {
            return Ok(None);
        };
        // There are few devices.
        Blank::make(index as u32, path, device.backend_size).map(Some)
    }

    /// Opens the disk that is here for the device of this number. A disk that a source offers must have the source's mark; a
    /// snapshot's disk is the file that the operator names.
    pub(super) fn open_disk(
        &self,
        index: usize,
        disk: &DiskBackend,
        access: Access,
        offered: Option<&OfferedDisks>,
    ) -> Result<BlockBackend, BlockBackendError> {
        let backend = BlockBackend::open_on(&disk.path, access, &disk.backing)?;
        let Some(offered) = offered else {
            return Ok(backend);
        };
        if !disk.is_shared {
            let mut marks = offered.marks.iter();
            let mark = marks.find(|mark| mark.device as usize == index);
            // No mark is at offset 0, so a disk without a mark is refused.
            backend.check_mark(mark.map_or(0, |mark| mark.offset))?;
        }
        Ok(backend.taken_over())
    }

    /// Everything about a machine's devices that cannot be had here, with what its source offers of its disks; a
    /// snapshot has no source.
    pub(super) fn check_devices(
        &self,
        devices: &[DeviceDescription],
        offered: Option<&OfferedDisks>,
    ) -> Vec<Difference> {
        if !(1..=MAX_DEVICES + 1).contains(&devices.len()) {
            let here = format!("1 to {}", MAX_DEVICES + 1);
            return vec![difference("devices", devices.len().to_string(), here)];
        }
        let mut differences: Vec<_> = devices
            .iter()
            .enumerate()
            .filter_map(|(index, device)| self.check_device(index, device, offered))
            .collect();
        differences.extend(self.shared_backends(devices));
        let disks = self.disks.keys().map(|id| (BlockState::KIND, "--disk", id));
        let nets = self.nets.keys().map(|id| (NetState::KIND, "--net", id));
        for (kind, option, id) in disks.chain(nets) {
            if !devices
                .iter()
                .any(|device| device.id == *id && device.kind == kind)
            {
                let noun = noun(kind);
                let what = format!("{noun} {id:?}");
                let expected = format!("no such {noun} in the machine");
                differences.push(difference(&what, expected, format!("{option} {id}=…")));
            }
        }
        if self.vsock.is_some() && !devices.iter().any(|device| device.kind == VsockState::KIND) {
            let what = format!("device {VSOCK_ID:?}");
            differences.push(difference(
                &what,
                "no such device in the machine",
                "--vsock uds=…",
            ));
        }
        let known = console_ports(devices);
        for name in self.ports.keys().filter(|name| !known.contains(*name)) {
            let what = format!("port {name:?}");
            differences.push(difference(
                &what,
                "no such port in the machine",
                format!("--port {name}=…"),
            ));
        }
        differences
    }

    /// What keeps this host from having the device, if anything does.
    fn check_device(
        &self,
        index: usize,
        device: &DeviceDescription,
        offered: Option<&OfferedDisks>,
    ) -> Option<Difference> {
        let what = format!("{} {:?}", noun(&device.kind), device.id);
        let is_rng = device.kind == RngState::KIND && device.id == RNG_ID;
        if (index == 0) != is_rng {
            let expected = format!("{} as device {index}", device.kind);
            let got = format!("{} {RNG_ID:?} as device 0, and only there", RngState::KIND);
            return Some(difference(&what, expected, got));
        }
        for (kind, id) in [(VsockState::KIND, VSOCK_ID), (ConsoleState::KIND, CONSOLE_ID)] {
            if device.kind == kind && device.id != id {
                return Some(difference(
                    &what,
                    "a name of its own",
                    format!("{kind} {id:?} alone"),
                ));
            }
        }
        // It is made only to find out whether that can be done, and goes when this check ends.
        let blank = match self.blank(index, device, offered) {
            Ok(blank) => blank,
            Err(error) => return Some(difference(&what, "room for it", migration::chain(&error))),
        };
        let opened = match self.open(index, device, blank.as_ref(), offered) {
            Ok(opened) => opened.device,
            Err(Unavailable { expected, got }) => return Some(difference(&what, expected, got)),
        };
        let here = description::device(&device.id, opened.describe());
        let missing = device.features & !here.features;
        if missing != 0 {
            let expected = format!("features {:#x}", device.features);
            return Some(difference(
                &what,
                expected,
                format!("none of {missing:#x} among them"),
            ));
        }
        let same = DeviceDescription {
            features: device.features,
            ..here
        };
        (*device != same).then(|| difference(&what, summary(device), summary(&same)))
    }

    /// Two devices with one name or one backend: the locks of disks would exclude each other, after "go", and a tap
    /// has room for one card.
    fn shared_backends(&self, devices: &[DeviceDescription]) -> Vec<Difference> {
        let mut differences = Vec::new();
        for (index, device) in devices.iter().enumerate() {
            for other in &devices[..index] {
                let noun = noun(&device.kind);
                if device.id == other.id {
                    let what = format!("device {:?}", device.id);
                    differences.push(difference(&what, "a name of its own", "two of that name"));
                } else if self.share_disk(device, other) {
                    let what = format!("{noun} {:?}", device.id);
                    let got = format!("that of {noun} {:?}", other.id);
                    differences.push(difference(&what, "a backend of its own", got));
                }
            }
        }
        differences
    }

    fn share_disk(&self, device: &DeviceDescription, other: &DeviceDescription) -> bool {
        let (Some(disk), Some(other_disk)) = (self.disks.get(&device.id), self.disks.get(&other.id)) else {
            return false;
        };
        let same = |path: &Path, other: &Path| match (identity(path), identity(other)) {
            // Both do not exist yet, and are to be made.
            (None, None) => path == other,
            (ours, theirs) => ours == theirs,
        };
        disk.files(!device.read_only).any(|(path, writes)| {
            let mut others = other_disk.files(!other.read_only);
            others.any(|(other, also)| (writes || also) && same(path, other))
        })
    }
}

/// The names of the ports that a machine's console has.
fn console_ports(devices: &[DeviceDescription]) -> Vec<String> {
    let mut consoles = devices.iter().filter(|device| device.kind == ConsoleState::KIND);
    let parameters =
        consoles.find_map(|device| console::ConsoleParameters::from_bytes(&device.parameters).ok());
    parameters.unwrap_or_default().ports
}

fn is_nothing(error: io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

/// Identifies a file, whatever its name.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = path.metadata().ok()?;
    Some(if metadata.file_type().is_block_device() {
        (u64::MAX, metadata.rdev())
    } else {
        (metadata.dev(), metadata.ino())
    })
}

/// What users call a device of the kind.
fn noun(kind: &str) -> &'static str {
    match kind {
        BlockState::KIND => "disk",
        NetState::KIND => "network card",
        _ => "device",
    }
}

fn summary(device: &DeviceDescription) -> String {
    let mode = if device.read_only { "read-only" } else { "writable" };
    let made_with = if device.parameters.is_empty() {
        String::new()
    } else {
        format!(", made with {:02x?}", device.parameters)
    };
    format!(
        "{} version {}, {} bytes, {mode}{made_with}",
        device.kind, device.version, device.backend_size
    )
}

pub(super) fn difference(what: &str, expected: impl Into<String>, got: impl Into<String>) -> Difference {
    Difference {
        what: what.into(),
        expected: expected.into(),
        got: got.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use devices::Limits;
    use devices::virtio::VirtioDevice;
    use devices::virtio::rng::VirtioRng;
    use devices::virtio::vsock::{self, VirtioVsock};

    use super::*;

    const NOTHING: HostOffer = HostOffer {
        disks: BTreeMap::new(),
        nets: BTreeMap::new(),
        vsock: None,
        ports: BTreeMap::new(),
        max_memory: None,
        reserve: None,
    };

    fn disk(id: &str, read_only: bool) -> DeviceDescription {
        DeviceDescription {
            id: id.into(),
            kind: BlockState::KIND.into(),
            version: BlockState::VERSION,
            features: 0,
            backend_size: 512,
            read_only,
            parameters: Vec::new(),
        }
    }

    fn rng() -> DeviceDescription {
        description::device(RNG_ID, VirtioRng::new(Limits::default()).unwrap().describe())
    }

    fn check(arrival: &HostOffer, disks: &[DeviceDescription]) -> Vec<String> {
        let devices = [&[rng()], disks].concat();
        let found = arrival.check_devices(&devices, None);
        found.into_iter().map(|difference| difference.got).collect()
    }

    #[test]
    fn every_disk_has_a_name_and_a_backend_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let backend = |name: &str| DiskBackend {
            path: path(name),
            format: block::ImageFormat::Raw,
            backing: Vec::new(),
            is_shared: false,
        };
        std::fs::write(path("a"), [0; 512]).unwrap();
        std::fs::hard_link(path("a"), path("also-a")).unwrap();
        std::fs::write(path("b"), [0; 512]).unwrap();
        let arrival = |other: &str| HostOffer {
            disks: [("x".into(), backend("a")), ("y".into(), backend(other))].into(),
            ..NOTHING
        };
        let both = [disk("x", false), disk("y", false)];
        assert!(check(&arrival("b"), &both).is_empty());
        assert_eq!(check(&arrival("also-a"), &both), ["that of disk \"x\""]);
        let read_only = [disk("x", true), disk("y", true)];
        assert!(check(&arrival("also-a"), &read_only).is_empty());
        let twice = [disk("x", false), disk("y", false), disk("x", false)];
        assert_eq!(check(&arrival("b"), &twice), ["two of that name"]);
    }

    #[test]
    fn every_network_card_has_a_tap() {
        let card = |id: &str, parameters: &[u8]| DeviceDescription {
            kind: NetState::KIND.into(),
            version: NetState::VERSION,
            backend_size: 0,
            parameters: parameters.into(),
            ..disk(id, false)
        };
        let good = card("x", &[2, 0, 0, 0, 0, 1, 0xdc, 5, 1, 0, 0]);
        assert_eq!(check(&NOTHING, &[good]), ["none (use --net x=TAP)"]);
        let nonsense = check(&NOTHING, &[card("x", &[0; 11])]);
        assert!(nonsense[0].contains("MAC address"), "{nonsense:?}");
    }

    #[test]
    fn only_as_many_devices_as_there_are_slots_are_checked() {
        assert_eq!(NOTHING.check_devices(&[], None)[0].expected, "0");
        let many = vec![disk("x", false); 100_000];
        assert_eq!(check(&NOTHING, &many), ["1 to 13"]);
    }

    #[test]
    fn limits_that_are_none_are_refused() {
        let nonsense = DeviceDescription {
            parameters: vec![1],
            ..rng()
        };
        let differences = NOTHING.check_devices(&[nonsense], None);
        assert_eq!(differences[0].got, "[01]");
    }

    #[test]
    fn a_socket_device_is_wanted_on_both_sides() {
        let directory = tempfile::tempdir().unwrap();
        let backend = vsock::VsockBackend::open(&directory.path().join("source")).unwrap();
        let parameters = vsock::VsockParameters {
            guest_cid: 3,
            limits: Limits::default(),
        };
        let device = VirtioVsock::new(Arc::new(backend), parameters).unwrap();
        let source = description::device(VSOCK_ID, device.describe());
        let arrival = HostOffer {
            vsock: Some(directory.path().join("here")),
            ..NOTHING
        };
        let check_one = |arrival: &HostOffer, device| check(arrival, &[device]);
        assert!(check_one(&arrival, source.clone()).is_empty());
        assert_eq!(
            check_one(&NOTHING, source.clone()),
            ["none (use --vsock uds=PATH)"]
        );
        assert_eq!(check(&arrival, &[]), ["--vsock uds=…"]);
        let nonsense = DeviceDescription {
            parameters: vec![0; 5],
            ..source.clone()
        };
        assert_eq!(check_one(&arrival, nonsense), ["[00, 00, 00, 00, 00]"]);
        let renamed = DeviceDescription {
            id: "x".into(),
            ..source.clone()
        };
        assert_eq!(check_one(&arrival, renamed), ["virtio-vsock \"vsock\" alone"]);
        let twice = check(&arrival, &[source.clone(), source]);
        assert_eq!(twice, ["two of that name"]);
    }

    #[test]
    fn every_port_of_a_console_has_a_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let ports = ["a", "b"].map(|name| (name.to_owned(), path(name)));
        let terminal = Arc::new(console::ConsoleTerminal::new().unwrap());
        let backend = Arc::new(console::ConsoleBackend::open(&ports).unwrap());
        let device = console::VirtioConsole::new(terminal, backend, true);
        let source = description::device(CONSOLE_ID, device.describe());
        let with = |ports: &[(&str, &str)]| HostOffer {
            ports: ports
                .iter()
                .map(|(name, file)| ((*name).to_owned(), path(file)))
                .collect(),
            ..NOTHING
        };
        let check_one = |ports: &[(&str, &str)]| check(&with(ports), std::slice::from_ref(&source));
        assert!(check_one(&[("a", "x"), ("b", "y")]).is_empty());
        assert_eq!(check_one(&[("a", "x")]), ["none for \"b\" (use --port b=PATH)"]);
        assert_eq!(check_one(&[("a", "x"), ("b", "y"), ("c", "z")]), ["--port c=…"]);
        let shared = check_one(&[("a", "x"), ("b", "x")]);
        assert!(shared[0].contains("a socket of its own"), "{shared:?}");
        assert_eq!(check(&with(&[("a", "x")]), &[]), ["--port a=…"]);
        let nonsense = DeviceDescription {
            parameters: vec![2],
            ..source.clone()
        };
        assert!(check(&with(&[]), &[nonsense])[0].starts_with("parameters: expected"));
    }
}
