//! The machine as the migration engine's destination: checks, builds and restores an arriving machine. Nothing that the
//! peer describes is opened by a path of the peer's, and nothing writes guest memory before the resume.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::GuestMemory;
use devices::virtio::balloon::BalloonState;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VmFd};
use migration::{
    BlankDisk, CpuidLeaf, Destination, DeviceDescription, Difference, MachineDescription, MemoryKind,
    OfferedDisks, PortError,
};
use migration_state::Record;

use super::arrival::{HostOffer, difference};
use super::blank::Blank;
use super::build::{MachineSpec, create_vm};
use super::config::MAX_CPUS;
use super::description::cpuid_entries;
use super::state::Pending;
use super::vmclock::Disruption;
use super::{EventSink, Machine, MachineError, open_kvm};
use crate::boot::layout;
use crate::clock::ClockStart;
use crate::console::Console;
use crate::cpu::{self, Template};
use crate::memory::MemoryError;
use crate::{kvm, memory};

/// TSC frequencies that differ by no more than this, in parts per million, count as equal; it is what KVM
/// itself tolerates (its module parameter `tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Builds and restores one arriving machine.
pub struct MigrationDestination {
    kvm: Kvm,
    /// A VM for the next machine, if it was not used yet: it takes a moment to make and to drop one.
    vm: Option<VmFd>,
    host: Vec<kvm_cpuid_entry2>,
    host_tsc_khz: u32,
    arrival: HostOffer,
    console: Console,
    events: EventSink,
    /// Memory that waits for a machine of just that size.
    reserve: Option<GuestMemory>,
    machine: Option<Machine>,
    /// Whether the machine's memory was the reserve, or is another process's.
    resident: bool,
    /// The disks that come along, as they are filled.
    blanks: Vec<Arc<Blank>>,
    pending: Option<Pending>,
}

impl MigrationDestination {
    /// Opens KVM and makes the reserve. Fails where KVM is not usable, before a source connects.
    pub fn new(arrival: HostOffer, console: Console, events: EventSink) -> Result<Self, MachineError> {
        let kvm = open_kvm()?;
        let host = cpu::host_cpuid(&kvm)?;
        let vm = create_vm(&kvm)?;
        let host_tsc_khz = kvm::tsc_khz(&vm).map_err(MachineError::VmTscKhz)?;
        let mut destination = Self {
            kvm,
            vm: Some(vm),
            host,
            host_tsc_khz,
            arrival,
            console,
            events,
            reserve: None,
            machine: None,
            resident: false,
            blanks: Vec::new(),
            pending: None,
        };
        destination.prepare()?;
        Ok(destination)
    }

    /// Makes the reserve, if there is to be one, zeroed and resident. Called before each wait for a machine: a failed
    /// attempt may have used it. Takes as long as the host needs to find that much memory.
    pub fn prepare(&mut self) -> Result<(), MachineError> {
        let (Some(size), None, None) = (self.arrival.reserve, &self.reserve, &self.machine) else {
            return Ok(());
        };
        memory::check_size(size)?;
        let reserve = memory::create(&layout::ram_ranges(size), MemoryKind::Anonymous)?;
        memory::make_resident(&reserve)?;
        self.reserve = Some(reserve);
        Ok(())
    }

    /// Fails, with all reasons, where this host cannot run the machine.
    pub fn check_all(&self, description: &MachineDescription) -> Result<(), MachineError> {
        match self.differences(description, None) {
            differences if differences.is_empty() => Ok(()),
            differences => Err(MachineError::Unfit(differences)),
        }
    }

    /// The machine, once it has been received.
    pub fn into_machine(self) -> Option<Machine> {
        self.machine
    }

    /// Memory for a machine, and whether it is resident. Lets the reserve go where it does not fit.
    fn memory_for(
        &mut self,
        description: &MachineDescription,
        files: Option<Vec<OwnedFd>>,
    ) -> Result<(GuestMemory, bool), MachineError> {
        let ranges: Vec<_> = description
            .memory
            .iter()
            .map(|region| (region.gpa, region.len))
            .collect();
        let reserve = self.reserve.take();
        match (files, reserve) {
            (Some(_), _) if description.memory_kind != MemoryKind::Shared => Err(MachineError::Mismatch {
                what: "files behind memory that is not shared",
                expected: "none".into(),
                got: "some".into(),
            }),
            (Some(files), _) => Ok((memory::adopt(&ranges, files)?, true)),
            (None, Some(reserve))
                if description.memory_kind == MemoryKind::Anonymous && memory::ranges(&reserve) == ranges =>
            {
                Ok((reserve, true))
            }
            (None, unfit) => {
                // What it takes is what the machine may need.
                drop(unfit);
                Ok((memory::create(&ranges, description.memory_kind)?, false))
            }
        }
    }

    fn check_memory(&self, description: &MachineDescription) -> Vec<Difference> {
        let mut size = 0u64;
        let mut regions = Vec::new();
        for region in &description.memory {
            size = size.saturating_add(region.len);
            regions.push((region.gpa, region.len));
        }
        if let Some(limit) = self.arrival.max_memory.filter(|limit| size > *limit) {
            let expected = format!("{size} bytes");
            return vec![difference(
                "memory",
                expected,
                format!("at most {limit} bytes (--max-memory)"),
            )];
        }
        if let Err(error) = memory::check_size(size) {
            return vec![difference("memory", format!("{size} bytes"), error.to_string())];
        }
        if let Err(error) = self.check_room(size, description.memory_kind) {
            let pages = match description.memory_kind {
                MemoryKind::HugePages => " in huge pages",
                MemoryKind::Anonymous | MemoryKind::Shared => "",
            };
            let expected = format!("{size} bytes{pages}");
            return vec![difference("memory", expected, error.to_string())];
        }
        let here = layout::ram_ranges(size);
        if regions != here {
            return vec![difference(
                "memory map",
                format!("{regions:x?}"),
                format!("{here:x?}"),
            )];
        }
        Vec::new()
    }

    fn check_room(&self, size: u64, kind: MemoryKind) -> Result<(), MemoryError> {
        let reserved = self.reserve.as_ref().map_or(0, |reserve| {
            memory::ranges(reserve).iter().map(|(_, len)| len).sum()
        });
        match kind {
            // The reserve is used for it, or given back first.
            MemoryKind::Anonymous => memory::check_room(size.saturating_sub(reserved), kind),
            MemoryKind::HugePages => memory::check_room(size, kind),
            // It may be handed over, and then takes nothing here: what is missing is found when it is made.
            MemoryKind::Shared => Ok(()),
        }
    }

    /// Every difference that forbids to run the machine here.
    fn differences(
        &self,
        description: &MachineDescription,
        offered: Option<&OfferedDisks>,
    ) -> Vec<Difference> {
        let mut differences = self.check_memory(description);
        if !(1..=MAX_CPUS).contains(&description.cpus) {
            let got = description.cpus.to_string();
            differences.push(difference("vCPUs", got, format!("1 to {MAX_CPUS}")));
        }
        if description.cpu_template.parse::<Template>().is_err() {
            let expected = description.cpu_template.clone();
            differences.push(difference(
                "cpu template",
                expected,
                format!("one of {}", Template::names()),
            ));
        }
        differences.extend(check_cpuid(&description.cpuid, &self.host));
        differences.extend(self.check_tsc(description));
        differences.extend(self.arrival.check_devices(&description.devices, offered));
        let balloon = |device: &DeviceDescription| device.kind == BalloonState::KIND;
        if description.memory_kind == MemoryKind::HugePages && description.devices.iter().any(balloon) {
            differences.push(difference("balloon", "one beside huge pages", "none beside them"));
        }
        differences
    }

    fn check_tsc(&self, description: &MachineDescription) -> Option<Difference> {
        let (expected, got) = (u64::from(description.tsc_khz), u64::from(self.host_tsc_khz));
        let close = expected.abs_diff(got) * 1_000_000 <= expected * TSC_TOLERANCE_PPM;
        if close || self.kvm.check_extension(Cap::TscControl) {
            return None;
        }
        let expected = format!("{expected} kHz within {TSC_TOLERANCE_PPM} ppm");
        Some(difference(
            "tsc frequency",
            expected,
            format!("{got} kHz, and no TSC scaling"),
        ))
    }

    pub(super) fn build(
        &mut self,
        description: &MachineDescription,
        memory: GuestMemory,
        offered: Option<&OfferedDisks>,
    ) -> Result<Machine, MachineError> {
        let open = |(index, device): (usize, &DeviceDescription)| {
            let blank = self.blanks.iter().find(|blank| blank.device() as usize == index);
            let opened = self
                .arrival
                .open(index, device, blank.map(|blank| &**blank), offered);
            opened.map_err(|why| MachineError::Mismatch {
                what: "device",
                expected: format!("{:?} with {}", device.id, why.expected),
                got: why.got,
            })
        };
        let devices: Result<Vec<_>, _> = description.devices.iter().enumerate().map(open).collect();
        let spec = MachineSpec {
            memory,
            // The way in which a host logs writes does not travel.
            dirty_ring: false,
            cpus: description.cpus,
            template: description.cpu_template.parse()?,
            cpuid: cpuid_entries(&description.cpuid, &self.host),
            tsc_khz: Some(description.tsc_khz).filter(|khz| *khz != self.host_tsc_khz),
            devices: devices?,
        };
        let vm = self.vm.take().map_or_else(|| create_vm(&self.kvm), Ok)?;
        Machine::build(open_kvm()?, spec, &self.console, self.events.clone(), vm)
    }
}

impl Destination for MigrationDestination {
    fn check(&self, description: &MachineDescription, disks: &OfferedDisks) -> Vec<Difference> {
        self.differences(description, Some(disks))
    }

    fn create(
        &mut self,
        description: &MachineDescription,
        files: Option<Vec<OwnedFd>>,
        disks: &OfferedDisks,
    ) -> Result<GuestMemory, PortError> {
        let (memory, resident) = self.memory_for(description, files)?;
        let blanks: Result<Vec<_>, _> = (description.devices.iter().enumerate())
            .map(|(index, device)| self.arrival.blank(index, device, Some(disks)))
            .collect();
        self.blanks = blanks?.into_iter().flatten().map(Arc::new).collect();
        self.machine = Some(self.build(description, memory.clone(), Some(disks))?);
        self.resident = resident;
        Ok(memory)
    }

    fn blank_disks(&self) -> Vec<Arc<dyn BlankDisk>> {
        let disk = |blank: &Arc<Blank>| blank.clone() as Arc<dyn BlankDisk>;
        // There is nothing to fill in an empty one.
        let filled = self.blanks.iter().filter(|blank| blank.size() > 0);
        filled.map(disk).collect()
    }

    fn is_resident(&self) -> bool {
        self.resident
    }

    fn rehearse(&mut self, state: &[u8]) -> Result<Duration, PortError> {
        let machine = self
            .machine
            .as_ref()
            .ok_or("rehearse: expected a machine, got none")?;
        self.blanks.iter().try_for_each(|blank| blank.rehearse())?;
        machine.rehearse_restore(state)?;
        let began = Instant::now();
        machine.rehearse_resume()?;
        Ok(began.elapsed())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), PortError> {
        let machine = self
            .machine
            .as_ref()
            .ok_or("restore: expected a machine, got none")?;
        self.pending = Some(machine.restore(state)?);
        self.blanks.iter().try_for_each(|blank| blank.publish())?;
        Ok(())
    }

    fn resume(&mut self, stopped_at: Instant) -> Result<(), PortError> {
        let machine = self
            .machine
            .as_ref()
            .ok_or("resume: expected a machine, got none")?;
        let pending = self
            .pending
            .take()
            .ok_or("resume: expected a restored machine, got a bare one")?;
        // Whatever happens from here on, these are the guest's disks, until an operator discards the machine.
        self.blanks.iter().for_each(|blank| blank.keep());
        machine.set_made_disks(self.blanks.clone());
        machine.devices.take_locks()?;
        machine.devices.invalidate()?;
        machine.announce_disruption(Disruption::Moved)?;
        machine.run_restored(&pending, ClockStart::StoppedAt(stopped_at))?;
        machine.set_made_disks(Vec::new());
        Ok(())
    }

    fn discard(&mut self) {
        self.resident = false;
        self.pending = None;
        self.machine = None;
        self.blanks.clear();
    }
}

/// No table that KVM would take has more leaves; more of them would only cost time.
fn check_cpuid(leaves: &[CpuidLeaf], host: &[kvm_cpuid_entry2]) -> Vec<Difference> {
    if leaves.len() > KVM_MAX_CPUID_ENTRIES {
        let got = format!("at most {KVM_MAX_CPUID_ENTRIES}");
        return vec![difference("cpuid leaves", leaves.len().to_string(), got)];
    }
    cpu::compare(leaves, host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_leaves_than_kvm_takes_are_refused_at_once() {
        let leaf = CpuidLeaf {
            function: 1,
            index: 0,
            registers: [u32::MAX; 4],
        };
        let found = check_cpuid(&vec![leaf; KVM_MAX_CPUID_ENTRIES + 1], &[]);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].what, "cpuid leaves");
        assert!(
            check_cpuid(&[leaf], &[])
                .iter()
                .all(|found| found.what != "cpuid leaves")
        );
    }
}
