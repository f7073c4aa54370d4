//! Opens virtio devices with what is behind them on this host. This is the one place that knows every kind of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::Limits;
use devices::virtio::VirtioDevice;
use devices::virtio::balloon::{BalloonControl, BalloonState, VirtioBalloon};
use devices::virtio::block::{self, Access, BlockBackend, BlockBackendError, BlockState, VirtioBlock};
use devices::virtio::console::{self, ConsoleState, ConsoleTerminal, VirtioConsole};
use devices::virtio::net::{MacAddress, NetParameters, NetState, Tap, VirtioNet};
use devices::virtio::rng::{RngState, VirtioRng};
use devices::virtio::vsock::{self, VirtioVsock, VsockState};
use migration::{DeviceDescription, OfferedDisks};
use migration_state::Record;

use super::MachineError;
use super::arrival::HostOffer;
use super::blank::Blank;
use super::config::MachineConfig;
use super::devices::{MachineTerminal, NamedDevice, io_error};

/// The name of the entropy device, which every machine has, as the first on the bus.
pub(crate) const RNG_ID: &str = "rng";
/// The name of the balloon.
pub(crate) const BALLOON_ID: &str = "balloon";
/// The name of the socket device, of which a machine has one at most.
pub(crate) const VSOCK_ID: &str = "vsock";
/// The name of the console device, of which a machine has one at most.
pub(crate) const CONSOLE_ID: &str = "console";

/// Every kind that a machine can have.
const KINDS: [&str; 6] = [
    RngState::KIND,
    BlockState::KIND,
    NetState::KIND,
    BalloonState::KIND,
    VsockState::KIND,
    ConsoleState::KIND,
];

/// The devices of a machine that boots, in bus order.
pub(super) fn open(config: &MachineConfig) -> Result<Vec<NamedDevice>, MachineError> {
    let mut devices = vec![rng(config.rng_limits)?];
    for disk in &config.disks {
        let access = Access {
            read_only: disk.read_only,
            direct: disk.parameters.direct,
            format: disk.format,
        };
        let backend = BlockBackend::open_on(&disk.path, access, &disk.backing)?;
        devices.push(block(&disk.id, backend, disk.parameters)?);
    }
    for net in &config.nets {
        let tap = Tap::open(&net.tap)?;
        let random = || MacAddress::random().map_err(io_error("random MAC address"));
        let parameters = NetParameters {
            mac: net.mac.map_or_else(random, Ok)?,
            mtu: tap.mtu(),
            queue_pairs: net.queues,
            rx_limits: net.rx_limits,
            tx_limits: net.tx_limits,
        };
        devices.push(named(&net.id, VirtioNet::new(tap, parameters)?));
    }
    if let Some(config) = config.balloon {
        devices.push(balloon(config.bytes, config.deflate_on_oom)?);
    }
    if let Some(config) = &config.vsock {
        let backend = vsock::VsockBackend::open(&config.uds)?;
        devices.push(socket_device(
            backend,
            vsock::VsockParameters {
                guest_cid: config.guest_cid,
                limits: config.limits,
            },
        )?);
    }
    if let Some(config) = &config.console {
        devices.push(virtio_console(&config.ports, config.has_terminal)?);
    }
    Ok(devices)
}

impl HostOffer {
    /// Opens a device like the one of this number that a peer describes, with what this host has for it. The description
    /// is untrusted, and the caller compares the device with it. A disk is the one in `blank`, if there is one, or else the
    /// source's own.
    pub(super) fn open(
        &self,
        index: usize,
        description: &DeviceDescription,
        blank: Option<&Blank>,
        offered: Option<&OfferedDisks>,
    ) -> Result<NamedDevice, Unavailable> {
        match description.kind.as_str() {
            RngState::KIND => open_rng(description),
            BlockState::KIND => self.open_block(index, description, blank, offered),
            NetState::KIND => self.open_net(description),
            BalloonState::KIND => open_balloon(description),
            VsockState::KIND => self.open_vsock(description),
            ConsoleState::KIND => self.open_console(description),
            _ => Err(Unavailable {
                expected: "a kind that is known here",
                got: format!("{:?}, which is none of {KINDS:?}", description.kind),
            }),
        }
    }

    fn open_block(
        &self,
        index: usize,
        description: &DeviceDescription,
        blank: Option<&Blank>,
        offered: Option<&OfferedDisks>,
    ) -> Result<NamedDevice, Unavailable> {
        let DeviceDescription { id, parameters, .. } = description;
        let disk = self.disks.get(id).ok_or_else(|| Unavailable {
            expected: "a backend",
            got: format!("none (use --disk {id}=PATH)"),
        })?;
        let parameters = block::BlockParameters::from_bytes(parameters).ok_or_else(|| Unavailable {
            expected: "cache mode and rate limits",
            got: format!("{parameters:02x?}"),
        })?;
        let access = Access {
            read_only: description.read_only,
            direct: parameters.direct,
            format: disk.format,
        };
        let opened = match blank {
            Some(blank) => blank.open(access),
            None => self.open_disk(index, disk, access, offered),
        };
        if let Err(BlockBackendError::NotTheSame { path }) = &opened {
            return Err(Unavailable::another_disk(id, path));
        }
        opened
            .map_err(MachineError::from)
            .and_then(|backend| block(id, backend, parameters))
            .map_err(|error| Unavailable {
                expected: "a usable backend",
                got: migration::chain(&error),
            })
    }

    fn open_net(
        &self,
        DeviceDescription { id, parameters, .. }: &DeviceDescription,
    ) -> Result<NamedDevice, Unavailable> {
        let parameters = NetParameters::from_bytes(parameters).map_err(|error| Unavailable {
            expected: "an address, an MTU, queues and rate limits",
            got: error.to_string(),
        })?;
        let tap = self.nets.get(id).ok_or_else(|| Unavailable {
            expected: "a tap",
            got: format!("none (use --net {id}=TAP)"),
        })?;
        let net = tap.try_clone().and_then(|tap| VirtioNet::new(tap, parameters));
        let net = net.map_err(|error| Unavailable {
            expected: "a usable tap",
            got: error.to_string(),
        })?;
        Ok(named(id, net))
    }

    fn open_vsock(
        &self,
        DeviceDescription { parameters, .. }: &DeviceDescription,
    ) -> Result<NamedDevice, Unavailable> {
        let path = self.vsock.as_ref().ok_or_else(|| Unavailable {
            expected: "a socket on the host",
            got: "none (use --vsock uds=PATH)".into(),
        })?;
        let parameters = vsock::VsockParameters::from_bytes(parameters).ok_or_else(|| Unavailable {
            expected: "the guest's CID and rate limits",
            got: format!("{parameters:02x?}"),
        })?;
        vsock::VsockBackend::open(path)
            .map_err(MachineError::from)
            .and_then(|backend| socket_device(backend, parameters))
            .map_err(|error| Unavailable {
                expected: "a usable socket on the host",
                got: migration::chain(&error),
            })
    }

    fn open_console(
        &self,
        DeviceDescription { parameters, .. }: &DeviceDescription,
    ) -> Result<NamedDevice, Unavailable> {
        let parameters = console::ConsoleParameters::from_bytes(parameters).map_err(|error| Unavailable {
            expected: "a console's ports",
            got: error.to_string(),
        })?;
        let port = |name: String| match self.ports.get(&name) {
            Some(path) => Ok((name, path.clone())),
            None => Err(Unavailable {
                expected: "a socket on the host for each port",
                got: format!("none for {name:?} (use --port {name}=PATH)"),
            }),
        };
        let ports: Vec<_> = parameters.ports.into_iter().map(port).collect::<Result<_, _>>()?;
        virtio_console(&ports, parameters.has_terminal).map_err(|error| Unavailable {
            expected: "usable sockets on the host",
            got: migration::chain(&error),
        })
    }
}

fn open_rng(DeviceDescription { parameters, .. }: &DeviceDescription) -> Result<NamedDevice, Unavailable> {
    let limits = Limits::from_bytes(parameters).ok_or_else(|| Unavailable {
        expected: "rate limits",
        got: format!("{parameters:02x?}"),
    })?;
    rng(limits).map_err(|error| Unavailable {
        expected: "an entropy device",
        got: migration::chain(&error),
    })
}

fn open_balloon(
    DeviceDescription { id, parameters, .. }: &DeviceDescription,
) -> Result<NamedDevice, Unavailable> {
    let opened = match VirtioBalloon::deflates_on_oom(parameters) {
        // How much memory the balloon is to have is part of its state, which comes later.
        Some(deflates) if id == BALLOON_ID => balloon(0, deflates).map_err(|error| migration::chain(&error)),
        _ => Err(format!("{id:?} made with {parameters:02x?}")),
    };
    opened.map_err(|got| Unavailable {
        expected: "a balloon of that name",
        got,
    })
}

/// Why a device cannot be had here.
#[derive(Debug)]
pub(super) struct Unavailable {
    pub(super) expected: &'static str,
    pub(super) got: String,
}

impl Unavailable {
    fn another_disk(id: &str, path: &Path) -> Self {
        Self {
            expected: "the source's own disk, which the source has locked",
            got: format!(
                "{} without the source's lock: another file, or one where locks do not travel. Where nothing is, \
                 --with-disks makes the disk; if it is the source's, say so: --disk {id}={},shared=on",
                path.display(),
                path.display()
            ),
        }
    }
}

fn block(
    id: &str,
    backend: BlockBackend,
    parameters: block::BlockParameters,
) -> Result<NamedDevice, MachineError> {
    let device = VirtioBlock::new(Arc::new(backend), id, parameters).map_err(io_error("disk"))?;
    Ok(NamedDevice {
        disk: Some(device.control().clone()),
        ..named(id, device)
    })
}

fn rng(limits: Limits) -> Result<NamedDevice, MachineError> {
    let device = VirtioRng::new(limits).map_err(io_error("entropy device"))?;
    Ok(named(RNG_ID, device))
}

fn socket_device(
    backend: vsock::VsockBackend,
    parameters: vsock::VsockParameters,
) -> Result<NamedDevice, MachineError> {
    let device = VirtioVsock::new(Arc::new(backend), parameters).map_err(io_error("socket device"))?;
    Ok(named(VSOCK_ID, device))
}

fn balloon(bytes: u64, deflate_on_oom: bool) -> Result<NamedDevice, MachineError> {
    let control = Arc::new(BalloonControl::new(bytes).map_err(io_error("balloon"))?);
    let device = VirtioBalloon::new(control.clone(), deflate_on_oom).map_err(io_error("balloon"))?;
    Ok(NamedDevice {
        balloon: Some(control),
        ..named(BALLOON_ID, device)
    })
}

fn virtio_console(ports: &[(String, PathBuf)], has_terminal: bool) -> Result<NamedDevice, MachineError> {
    let terminal = Arc::new(ConsoleTerminal::new().map_err(io_error("console"))?);
    let backend = Arc::new(console::ConsoleBackend::open(ports)?);
    Ok(NamedDevice {
        terminal: Some(MachineTerminal {
            terminal: terminal.clone(),
            has_input: has_terminal,
        }),
        ..named(CONSOLE_ID, VirtioConsole::new(terminal, backend, has_terminal))
    })
}

fn named(id: &str, device: impl VirtioDevice + 'static) -> NamedDevice {
    NamedDevice {
        id: id.into(),
        device: Box::new(device),
        balloon: None,
        terminal: None,
        disk: None,
    }
}
