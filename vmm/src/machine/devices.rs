//! The machine's devices: built, wired to KVM, stopped and resumed together.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devices::bus::{Bus, BusDevice};
use devices::legacy::{AcpiPower, I8042, PvPanic, Serial};
use devices::virtio::mmio::MmioTransport;
use devices::virtio::{HostBackend, HostError, VirtioDevice, balloon, block, console};
use devices::{Counters, ExitEvent, GuestExit, GuestMemory};
use kvm_ioctls::{IoEventAddress, VmFd};
use migration::DeviceDescription;
use migration_state::Envelope;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::description;
use super::device_thread::DeviceThread;
use super::{CONSOLE_ID, EventSink, MachineError, MachineEvent, VSOCK_ID, kvm_error};
use crate::boot::{VirtioMmioSlot, layout};
use crate::console::Console;

/// Ports of a 16550.
const SERIAL_PORTS: u64 = 8;
/// Ports of the keyboard controller: data at the first, command and status at the fifth.
const I8042_PORTS: u64 = 5;
/// How long devices have to finish what they have begun, and to make it durable: whatever wants a guest that stands
/// still fails after that, and the guest goes on.
pub(super) const DRAIN_TIME: Duration = Duration::from_secs(5);
/// Begins the name of a virtio device's saved state; the device's own name follows.
pub(crate) const INSTANCE_PREFIX: &str = "virtio/";

/// A virtio device, and its name in the machine.
pub(crate) struct NamedDevice {
    pub(crate) id: String,
    pub(crate) device: Box<dyn VirtioDevice>,
    /// The host's end of it, if it is a balloon.
    pub(crate) balloon: Option<Arc<balloon::BalloonControl>>,
    /// The host's end of it, if it is a console.
    pub(crate) terminal: Option<MachineTerminal>,
    /// The host's end of it, if it is a disk.
    pub(crate) disk: Option<Arc<block::BlockControl>>,
}

/// The host's end of a virtio console.
#[derive(Clone)]
pub(crate) struct MachineTerminal {
    pub(crate) terminal: Arc<console::ConsoleTerminal>,
    /// Whether it gets the machine's input, and the serial port does not.
    pub(crate) has_input: bool,
}

/// A virtio device in its slot.
pub(super) struct VirtioSlot {
    pub(super) id: String,
    pub(super) address: VirtioMmioSlot,
    balloon: Option<Arc<balloon::BalloonControl>>,
    terminal: Option<MachineTerminal>,
    metrics: [Arc<dyn Counters>; 2],
    pub(super) disk: Option<Arc<block::BlockControl>>,
    /// Beside the transport: its calls wait for disks, and must not be made with a lock that a vCPU can want.
    backend: Option<Arc<dyn HostBackend>>,
    transport: Arc<Mutex<MmioTransport>>,
}

impl VirtioSlot {
    pub(super) fn transport(&self) -> MutexGuard<'_, MmioTransport> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn instance(&self) -> String {
        format!("{INSTANCE_PREFIX}{}", self.id)
    }
}

/// All devices of a machine.
pub(super) struct DeviceSet {
    // Ends first, so that no queue is served while the devices go.
    _thread: DeviceThread,
    pub(super) pio: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    pub(super) serial: Arc<Mutex<Serial>>,
    exit: ExitEvent,
    i8042: Arc<Mutex<I8042>>,
    power: Arc<Mutex<AcpiPower>>,
    /// Raised when the machine has a new generation ID.
    pub(super) generation: EventFd,
    /// Raised when the machine's VMClock has changed.
    pub(super) vmclock: EventFd,
    pub(super) virtio: Vec<VirtioSlot>,
}

impl DeviceSet {
    pub(super) fn build(
        vm: &VmFd,
        memory: &GuestMemory,
        named: Vec<NamedDevice>,
        console: &Console,
        events: EventSink,
    ) -> Result<Self, MachineError> {
        let exit = ExitEvent::new().map_err(io_error("exit event"))?;
        let serial = Serial::new(interrupt(vm, layout::SERIAL_GSI)?, console.sink())?;
        let serial = Arc::new(Mutex::new(serial));
        let i8042 = Arc::new(Mutex::new(I8042::new(exit.clone())));
        let power = AcpiPower::new(exit.clone(), interrupt(vm, layout::POWER_GSI)?);
        let power = Arc::new(Mutex::new(power));
        let panic_notifier = Arc::new(Mutex::new(PvPanic::new(exit.clone())));
        let mut pio = Bus::new();
        pio.insert(layout::SERIAL_PORT.into(), SERIAL_PORTS, serial.clone())?;
        pio.insert(layout::I8042_PORT.into(), I8042_PORTS, i8042.clone())?;
        pio.insert(layout::PVPANIC_PORT.into(), PvPanic::LEN, panic_notifier)?;
        pio.insert(layout::ACPI_POWER_PORT.into(), AcpiPower::LEN, power.clone())?;

        let mut virtio = Vec::with_capacity(named.len());
        for (index, named) in named.into_iter().enumerate() {
            if let Some(MachineTerminal { terminal, .. }) = &named.terminal {
                terminal.connect(console.sink());
            }
            virtio.push(virtio_slot(vm, memory, index, named)?);
        }
        let mut mmio = Bus::new();
        for slot in &virtio {
            let device: Arc<Mutex<dyn BusDevice>> = slot.transport.clone();
            mmio.insert(slot.address.base, layout::VIRTIO_MMIO_LEN, device)?;
        }
        let workers = virtio.iter().map(|slot| slot.transport().worker()).collect();
        let on_exit = Box::new(move |reason| events(MachineEvent::Exit(reason)));
        let thread =
            DeviceThread::start(workers, exit.clone(), on_exit).map_err(io_error("device thread"))?;
        Ok(Self {
            _thread: thread,
            pio: Arc::new(pio),
            mmio: Arc::new(mmio),
            serial,
            exit,
            i8042,
            power,
            generation: interrupt(vm, layout::GENERATION_GSI)?,
            vmclock: interrupt(vm, layout::VMCLOCK_GSI)?,
            virtio,
        })
    }

    /// The virtio devices in bus order.
    pub(super) fn describe(&self) -> Vec<DeviceDescription> {
        let describe = |slot: &VirtioSlot| description::device(&slot.id, slot.transport().describe());
        self.virtio.iter().map(describe).collect()
    }

    /// What firmware tables say about the virtio devices.
    pub(super) fn slots(&self) -> Vec<VirtioMmioSlot> {
        self.virtio.iter().map(|slot| slot.address).collect()
    }

    pub(super) fn balloon(&self) -> Option<Arc<balloon::BalloonControl>> {
        self.virtio.iter().find_map(|slot| slot.balloon.clone())
    }

    /// The virtio console that gets the machine's input, if one does.
    pub(super) fn terminal(&self) -> Option<Arc<console::ConsoleTerminal>> {
        let mut terminals = self.virtio.iter().filter_map(|slot| slot.terminal.as_ref());
        let found = terminals.find(|terminal| terminal.has_input)?;
        Some(found.terminal.clone())
    }

    /// What the virtio devices have counted, by their names.
    pub(super) fn metrics(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let read = |slot: &VirtioSlot| {
            let counters = slot.metrics.iter().flat_map(|counters| counters.read());
            counters.map(|(name, count)| (name.to_owned(), count)).collect()
        };
        self.virtio
            .iter()
            .map(|slot| (slot.id.clone(), read(slot)))
            .collect()
    }

    pub(super) fn disk(&self, id: &str) -> Option<Arc<block::BlockControl>> {
        self.virtio.iter().find(|slot| slot.id == id)?.disk.clone()
    }

    /// How the guest ended, if it did.
    pub(super) fn exit_reason(&self) -> Option<GuestExit> {
        self.exit.reason()
    }

    pub(super) fn press_power_button(&self) -> std::io::Result<()> {
        lock(&self.power).press()
    }

    /// Writes back what backends have cached, also while the guest runs: it waits for nothing that is done here.
    pub(super) fn flush(&self) -> Result<(), MachineError> {
        self.for_each_backend(HostBackend::flush)
    }

    /// No device writes guest memory when it returns, and what the guest was told is on the disk. If that is not so by
    /// `until` it fails, and [`DeviceSet::resume`] has them go on.
    pub(super) fn drain(&self, until: Instant) -> Result<(), MachineError> {
        for slot in &self.virtio {
            slot.transport().pause();
        }
        for slot in &self.virtio {
            slot.transport().drain(until)?;
        }
        Ok(())
    }

    /// Devices go on; every queue is looked at.
    pub(super) fn resume(&self) {
        for slot in &self.virtio {
            slot.transport().resume();
        }
    }

    pub(super) fn take_locks(&self) -> Result<(), MachineError> {
        self.for_each_backend(HostBackend::take_locks)
    }

    pub(super) fn release_locks(&self) -> Result<(), MachineError> {
        self.for_each_backend(HostBackend::release_locks)
    }

    /// Removes the sockets of devices, which a process that just ends would leave behind. Waits for no thread. Disks
    /// stay locked: a device may still write to them.
    pub(super) fn close_sockets(&self) {
        let with_sockets = |slot: &&VirtioSlot| [VSOCK_ID, CONSOLE_ID].contains(&slot.id.as_str());
        for slot in self.virtio.iter().filter(with_sockets) {
            if let Some(backend) = &slot.backend
                && let Err(error) = backend.release_locks()
            {
                tracing::warn!(%error, "{}: its sockets stay behind", slot.id);
            }
        }
    }

    /// Puts what was written to disks into their files.
    pub(super) fn write_out(&self) -> Result<(), MachineError> {
        let backends = self
            .virtio
            .iter()
            .filter_map(|slot| Some((slot, slot.disk.as_ref()?.backend())));
        for (slot, backend) in backends {
            backend.write_out().map_err(|error| MachineError::Backend {
                id: slot.id.clone(),
                source: error.into(),
            })?;
        }
        Ok(())
    }

    /// Does that for the last time: nothing is written to them afterwards.
    pub(super) fn close_disks(&self) {
        for disk in self.virtio.iter().filter_map(|slot| slot.disk.as_ref()) {
            if let Err(error) = disk.backend().close() {
                tracing::error!(%error, "the end of what was written to a disk is lost");
            }
        }
    }

    /// An error if another process could not open a disk after this one; disks in `mirrored` are not checked.
    pub(super) fn check_disks_kept(&self, mirrored: &[u32]) -> Result<(), MachineError> {
        for (index, slot) in (0u32..).zip(&self.virtio) {
            if let Some(disk) = slot.disk.as_ref().filter(|_| !mirrored.contains(&index)) {
                disk.backend().check_kept()?;
            }
        }
        Ok(())
    }

    /// Nothing read from a disk before is used from here on.
    pub(super) fn invalidate(&self) -> Result<(), MachineError> {
        self.for_each_backend(HostBackend::invalidate)
    }

    pub(super) fn save(&self, envelope: &mut Envelope) -> Result<(), MachineError> {
        lock(&self.serial).save(envelope, "serial")?;
        lock(&self.i8042).save(envelope, "i8042")?;
        lock(&self.power).save(envelope, "power")?;
        for slot in &self.virtio {
            slot.transport().save(envelope, &slot.instance())?;
        }
        Ok(())
    }

    pub(super) fn restore(&self, envelope: &mut Envelope) -> Result<(), MachineError> {
        lock(&self.serial).restore(envelope, "serial")?;
        lock(&self.i8042).restore(envelope, "i8042")?;
        lock(&self.power).restore(envelope, "power")?;
        for slot in &self.virtio {
            slot.transport().restore(envelope, &slot.instance())?;
        }
        Ok(())
    }

    fn for_each_backend(
        &self,
        act: impl Fn(&(dyn HostBackend + 'static)) -> Result<(), HostError>,
    ) -> Result<(), MachineError> {
        for slot in &self.virtio {
            let Some(backend) = &slot.backend else { continue };
            act(&**backend).map_err(|source| MachineError::Backend {
                id: slot.id.clone(),
                source,
            })?;
        }
        Ok(())
    }
}

fn virtio_slot(
    vm: &VmFd,
    memory: &GuestMemory,
    index: usize,
    named: NamedDevice,
) -> Result<VirtioSlot, MachineError> {
    let gsi = *layout::VIRTIO_GSIS
        .get(index)
        .ok_or_else(|| MachineError::Mismatch {
            what: "virtio devices",
            expected: format!("at most {}", layout::VIRTIO_GSIS.len()),
            got: format!("at least {}", index + 1),
        })?;
    let base = layout::VIRTIO_MMIO + layout::VIRTIO_MMIO_LEN * index as u64;
    let transport = MmioTransport::new(named.device, memory.clone(), interrupt(vm, gsi)?)?;
    for (queue, event) in (0u32..).zip(transport.queue_events()) {
        let address = IoEventAddress::Mmio(base + MmioTransport::NOTIFY_OFFSET);
        vm.register_ioevent(event, &address, queue)
            .map_err(kvm_error("KVM_IOEVENTFD"))?;
    }
    let address = VirtioMmioSlot { base, gsi };
    Ok(VirtioSlot {
        id: named.id,
        address,
        balloon: named.balloon,
        terminal: named.terminal,
        metrics: transport.metrics(),
        backend: transport.host_backend(),
        disk: named.disk,
        transport: Arc::new(Mutex::new(transport)),
    })
}

/// An eventfd that raises the interrupt `gsi`.
fn interrupt(vm: &VmFd, gsi: u32) -> Result<EventFd, MachineError> {
    let event = EventFd::new(EFD_NONBLOCK).map_err(io_error("interrupt eventfd"))?;
    vm.register_irqfd(&event, gsi).map_err(kvm_error("KVM_IRQFD"))?;
    Ok(event)
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn io_error(what: &'static str) -> impl Fn(std::io::Error) -> MachineError {
    move |source| MachineError::Io { what, source }
}
