//! What a machine that boots is to be: its vCPUs, memory and devices, and what is behind those on this host.

use std::path::PathBuf;

use devices::Limits;
use devices::virtio::block;
use devices::virtio::net::{MacAddress, TapSource};
use migration::MemoryKind;

use crate::boot::{BootSource, layout};
use crate::cpu::Template;

/// Most vCPUs of a machine.
pub const MAX_CPUS: u8 = 32;
/// Most disks and network cards of a machine together: one slot is the entropy device's, and one each the balloon's,
/// the socket device's and the console's.
pub const MAX_DEVICES: usize = layout::VIRTIO_GSIS.len() - 1;

/// A disk of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// Its name, unique in the machine.
    pub id: String,
    /// An image or a block device.
    pub path: PathBuf,
    /// What the file is.
    pub format: block::ImageFormat,
    /// What it is on, if it is an image, from the upper to the lower.
    pub backing: Vec<block::BackingFile>,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// How it serves the guest.
    pub parameters: block::BlockParameters,
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
    /// What goes in each direction in a time.
    pub limits: Limits,
}

/// The console device of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleConfig {
    /// Whether it gets the input of the machine's terminal, and the serial port does not.
    pub has_terminal: bool,
    /// Names of its ports, and where programs on the host connect to them.
    pub ports: Vec<(String, PathBuf)>,
}

/// What a machine that boots is built from; the code that makes one has checked it.
#[derive(Clone, Debug)]
pub struct MachineConfig {
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
    /// What the entropy device gives in a time.
    pub rng_limits: Limits,
    /// The console device, if there is to be one.
    pub console: Option<ConsoleConfig>,
}
