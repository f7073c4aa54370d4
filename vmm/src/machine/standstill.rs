//! A machine that goes into files, and one that comes out of them.

use std::time::{Duration, Instant};

use ::devices::GuestMemory;
use migration::{MachineDescription, PageSet};

use super::{Machine, MachineError, MigrationDestination};
use crate::memory;
use crate::snapshot::Snapshot;
use crate::vcpu::Holder;

/// A machine whose guest stands still, with nothing in flight. It goes on when this is dropped.
pub struct Standstill<'a> {
    machine: &'a Machine,
    since: Instant,
    for_good: bool,
}

impl Machine {
    /// Lets the guest stand still until the answer is dropped.
    pub fn stand_still(&self) -> Result<Standstill<'_>, MachineError> {
        // Made first: a pause that fails lets go as well.
        let mut standstill = Standstill {
            machine: self,
            since: Instant::now(),
            for_good: false,
        };
        standstill.since = self.pause(Holder::Snapshot)?;
        self.devices.drain()?;
        Ok(standstill)
    }
}

impl MigrationDestination {
    /// Builds the snapshot's machine with that memory and its disks locked. The guest runs if it is to `resume`,
    /// whatever it did when the snapshot was made; its clocks go on from where they stood.
    pub fn restore_snapshot(
        self,
        snapshot: &Snapshot,
        memory: GuestMemory,
        resume: bool,
    ) -> Result<Machine, MachineError> {
        let machine = self.build(snapshot.machine(), memory)?;
        let pending = machine.restore(snapshot.state())?;
        let gate = machine.vcpus.gate();
        if resume {
            gate.open(Holder::User);
        } else {
            gate.close(Holder::User);
        }
        machine.devices.take_locks()?;
        machine.devices.invalidate()?;
        // For the guest no time has passed.
        machine.run_restored(&pending, Instant::now())?;
        Ok(machine)
    }
}

impl Standstill<'_> {
    /// The machine, in the migration engine's terms.
    pub fn describe(&self) -> MachineDescription {
        self.machine.describe()
    }

    /// The machine's saved state.
    pub fn state(&self) -> Result<Vec<u8>, MachineError> {
        self.machine.save(self.since)
    }

    /// The guest's memory, and its pages that may hold something.
    pub fn memory(&self) -> Result<(&GuestMemory, PageSet), MachineError> {
        let memory = &self.machine.memory;
        let mut populated = PageSet::of(memory).map_err(memory::MemoryError::from)?;
        memory::populated(memory, &mut populated)?;
        Ok((memory, populated))
    }

    /// How long the guest stands still so far.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// The guest does not go on.
    pub fn keep(mut self) {
        self.for_good = true;
    }
}

impl Drop for Standstill<'_> {
    fn drop(&mut self) {
        if !self.for_good {
            self.machine.devices.resume();
            self.machine.resume(Holder::Snapshot);
        }
    }
}
