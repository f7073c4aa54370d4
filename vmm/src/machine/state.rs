//! The whole machine's saved state: vCPUs, interrupt controllers, PIT, clocks, devices.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VcpuFd;
use migration::Rehearsal;
use migration_state::{Envelope, Record};
use serde::{Deserialize, Serialize};

use super::{Machine, MachineError, kvm_error};
use crate::boot::BootError;
use crate::clock::{self, ClockRecord, ClockStart};
use crate::vcpu::{self, Holder, Purpose, VcpuRecord, bytes, parse};

/// Bytes of `pvclock_wall_clock` (Documentation/virt/kvm/x86/msr.rst).
const WALL_CLOCK_LEN: usize = 12;

/// The interrupt controllers that are not a vCPU's own, and the PIT. Each byte string is the KVM structure
/// of that name, whose layout is kernel ABI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ChipsetRecord {
    /// `kvm_irqchip` of the 8259 master.
    #[serde(with = "serde_bytes")]
    pic_master: Vec<u8>,
    /// `kvm_irqchip` of the 8259 slave.
    #[serde(with = "serde_bytes")]
    pic_slave: Vec<u8>,
    /// `kvm_irqchip` of the I/O APIC.
    #[serde(with = "serde_bytes")]
    ioapic: Vec<u8>,
    /// `kvm_pit_state2`.
    #[serde(with = "serde_bytes")]
    pit: Vec<u8>,
}

impl Record for ChipsetRecord {
    const KIND: &'static str = "chipset";
    const VERSION: u16 = 1;
}

/// What belongs to the machine as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct MachineRecord {
    /// The user had paused the guest: it stays so wherever it goes.
    paused_by_user: bool,
}

impl Record for MachineRecord {
    const KIND: &'static str = "machine";
    const VERSION: u16 = 1;
}

/// What is left to be done when a restored machine is resumed.
#[derive(Debug)]
pub(super) struct Pending {
    clock: ClockRecord,
    vcpus: Arc<[VcpuRecord]>,
}

impl Machine {
    /// Saves a machine that is paused since `paused_at`, with its devices drained. Fails if it has come to its end.
    pub(super) fn save(&self, paused_at: Instant) -> Result<Vec<u8>, MachineError> {
        self.check_goes_on()?;
        let mut envelope = Envelope::new();
        let record = MachineRecord {
            paused_by_user: self.is_held_by(Holder::User),
        };
        envelope.put("machine", &record)?;
        self.save_processors(&mut envelope, paused_at)?;
        self.devices.save(&mut envelope)?;
        Ok(envelope.encode())
    }

    /// An error if the guest has ended. The vCPUs are out, so it cannot end later. That it ended is not part of the
    /// state: a machine restored from it would have a guest that stands still for ever.
    fn check_goes_on(&self) -> Result<(), MachineError> {
        let ended = match self.devices.exit_reason() {
            Some(reason) => format!("its end: {reason:?}"),
            None if self.has_failed_vcpu() => "one with a vCPU that failed".into(),
            None => return Ok(()),
        };
        Err(MachineError::Mismatch {
            what: "save",
            expected: "a guest that goes on".into(),
            got: ended,
        })
    }

    /// Pauses the vCPUs, saves what is not a device's, and lets them go on; how long that takes is what a
    /// migration's pause will cost.
    pub(super) fn rehearse_save(&self) -> Result<Rehearsal, MachineError> {
        if self.is_held_by(Holder::Migration) {
            return Err(MachineError::Mismatch {
                what: "rehearsal",
                expected: "a guest that no migration holds".into(),
                got: "one that is held".into(),
            });
        }
        let mut envelope = Envelope::new();
        let rehearsed = catch_unwind(AssertUnwindSafe(|| {
            let paused_at = self.pause(Holder::Migration, vcpu::park_deadline())?;
            let pause = paused_at.elapsed();
            self.save_processors(&mut envelope, paused_at)?;
            Ok::<_, MachineError>((pause, paused_at.elapsed() - pause))
        }));
        // Also after an error. The clocks did not stop, so nothing has to be announced to the guest.
        self.vcpus.resume(Holder::Migration);
        let (pause, save) = rehearsed.unwrap_or_else(|panic| resume_unwind(panic))?;
        let state = envelope.encode();
        Ok(Rehearsal { pause, save, state })
    }

    /// Restores a saved state into a new machine. Untrusted input.
    pub(super) fn restore(&self, state: &[u8]) -> Result<Pending, MachineError> {
        let mut envelope = Envelope::decode(state)?;
        let machine: MachineRecord = envelope.take("machine")?;
        let pending = self.restore_processors(&mut envelope, Purpose::Run)?;
        self.devices.restore(&mut envelope)?;
        envelope.finish()?;
        if machine.paused_by_user {
            self.vcpus.gate().close(Holder::User);
        }
        Ok(pending)
    }

    /// Restores what [`Machine::rehearse_save`] saved, as far as [`Machine::restore`] does it again. Untrusted
    /// input.
    pub(super) fn rehearse_restore(&self, state: &[u8]) -> Result<(), MachineError> {
        let mut envelope = Envelope::decode(state)?;
        self.restore_processors(&mut envelope, Purpose::Rehearsal)?;
        Ok(envelope.finish()?)
    }

    /// Does what will take most of the time of a resume: drops what was read from disks, and wakes the vCPUs' threads.
    /// Does not touch the disks' locks or the clocks, which are still the source's.
    pub(super) fn rehearse_resume(&self) -> Result<(), MachineError> {
        self.devices.invalidate()?;
        self.vcpus.rouse();
        Ok(())
    }

    /// Moves the clocks on and lets the guest run, see [`clock::advance`].
    pub(super) fn run_restored(&self, pending: &Pending, start: ClockStart) -> Result<(), MachineError> {
        let vcpus = self.vcpus.lock_all();
        for (vcpu, record) in vcpus.iter().zip(pending.vcpus.iter()) {
            vcpu::restore_shared_pages(vcpu, record)?;
        }
        let scaled = self.tsc.scaled;
        clock::advance(&self.vm, &vcpus, scaled, &pending.clock, &pending.vcpus, start)?;
        if let (Some(vcpu), Some(record)) = (vcpus.first(), pending.vcpus.first()) {
            self.restore_wall_clock(vcpu, record)?;
        }
        for vcpu in &vcpus {
            // See `Machine::resume`.
            let _ = vcpu.kvmclock_ctrl();
        }
        drop(vcpus);
        self.start();
        Ok(())
    }

    fn save_processors(&self, envelope: &mut Envelope, paused_at: Instant) -> Result<(), MachineError> {
        let (clock, tsc) = clock::save(&self.vm, &self.vcpus.lock_all(), self.tsc, paused_at)?;
        envelope.put("clock", &clock)?;
        let msrs = self.msrs.clone();
        let save = move |id, vcpu: &VcpuFd| {
            let tsc = clock::tsc_at(id, vcpu, tsc)?;
            Ok::<_, MachineError>(vcpu::save(&msrs, vcpu, tsc)?)
        };
        for (id, record) in self.vcpus.with_each(save)?.into_iter().enumerate() {
            envelope.put(&format!("vcpu{id}"), &record?)?;
        }
        Ok(envelope.put("chipset", &self.save_chipset()?)?)
    }

    fn restore_processors(&self, envelope: &mut Envelope, purpose: Purpose) -> Result<Pending, MachineError> {
        let clock: ClockRecord = envelope.take("clock")?;
        let chipset: ChipsetRecord = envelope.take("chipset")?;
        self.restore_chipset(&chipset, purpose)?;
        let records = (0..self.vcpus.count()).map(|id| envelope.take(&format!("vcpu{id}")));
        let vcpus: Arc<[VcpuRecord]> = records.collect::<Result<_, _>>()?;
        let (msrs, records) = (self.msrs.clone(), vcpus.clone());
        // There is a record for each vCPU.
        let restore = move |id: usize, vcpu: &VcpuFd| {
            let record = records.get(id);
            record.map_or(Ok(()), |record| vcpu::restore(&msrs, vcpu, record, purpose))
        };
        for restored in self.vcpus.with_each(restore)? {
            restored?;
        }
        Ok(Pending { clock, vcpus })
    }

    /// Tells KVM where the guest's wall clock lies. KVM answers by writing the time there at once; but the
    /// guest has read it long ago, and may have something else there by now, so what was there is put back.
    fn restore_wall_clock(&self, vcpu: &VcpuFd, record: &VcpuRecord) -> Result<(), MachineError> {
        use vm_memory::{Bytes, GuestAddress};
        for (index, gpa) in record.wall_clocks() {
            let mut before = [0u8; WALL_CLOCK_LEN];
            let in_memory = self.memory.read_slice(&mut before, GuestAddress(gpa)).is_ok();
            vcpu::set_msr(vcpu, index, gpa)?;
            if in_memory {
                self.memory
                    .write_slice(&before, GuestAddress(gpa))
                    .map_err(BootError::from)?;
            }
        }
        Ok(())
    }

    fn save_chipset(&self) -> Result<ChipsetRecord, MachineError> {
        let pit = self.vm.get_pit2().map_err(kvm_error("KVM_GET_PIT2"))?;
        Ok(ChipsetRecord {
            pic_master: self.save_irqchip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: self.save_irqchip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: self.save_irqchip(KVM_IRQCHIP_IOAPIC)?,
            pit: bytes(&pit),
        })
    }

    fn restore_chipset(&self, record: &ChipsetRecord, purpose: Purpose) -> Result<(), MachineError> {
        self.restore_irqchip(KVM_IRQCHIP_PIC_MASTER, &record.pic_master)?;
        self.restore_irqchip(KVM_IRQCHIP_PIC_SLAVE, &record.pic_slave)?;
        self.restore_irqchip(KVM_IRQCHIP_IOAPIC, &record.ioapic)?;
        let pit: kvm_pit_state2 = parse("kvm_pit_state2", &record.pit)?;
        if purpose == Purpose::Rehearsal {
            // Set, it would tick into the interrupt controllers from now on.
            return Ok(());
        }
        self.vm.set_pit2(&pit).map_err(kvm_error("KVM_SET_PIT2"))
    }

    fn save_irqchip(&self, chip_id: u32) -> Result<Vec<u8>, MachineError> {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        self.vm
            .get_irqchip(&mut chip)
            .map_err(kvm_error("KVM_GET_IRQCHIP"))?;
        Ok(bytes(&chip))
    }

    fn restore_irqchip(&self, chip_id: u32, saved: &[u8]) -> Result<(), MachineError> {
        let mut chip: kvm_irqchip = parse("kvm_irqchip", saved)?;
        chip.chip_id = chip_id;
        self.vm.set_irqchip(&chip).map_err(kvm_error("KVM_SET_IRQCHIP"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_records() {
        migration_state::assert_golden(1, "01", &MachineRecord { paused_by_user: true });
        let chipset = ChipsetRecord {
            pic_master: vec![1, 2],
            pic_slave: vec![3],
            ioapic: vec![],
            pit: vec![4],
        };
        migration_state::assert_golden(1, "0201020103000104", &chipset);
    }
}
