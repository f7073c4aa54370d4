//! What can be done to the machine while it stays here.

use std::sync::Arc;
use std::time::Instant;

use devices::virtio::balloon;
use migration::Control;

use super::{Ending, Life, POWER_OFF_GRACE, Refusal, SnapshotJob, Supervisor, failed};
use crate::VERSION;
use crate::api::{DriveUpdate, InstanceInfo, InstanceState, Metrics};
use crate::config::ConfigError;
use crate::machine::Machine;
use crate::vcpu::Holder;

impl Supervisor {
    pub(super) fn machine(&self) -> Result<&Arc<Machine>, Refusal> {
        match &self.life {
            Some(Life::Here(machine)) => Ok(machine),
            Some(Life::InDoubt(..)) => Err(Refusal::InDoubt),
            Some(Life::Receiving(_)) | None => Err(Refusal::NoMachine),
        }
    }

    /// The machine, if no migration and no snapshot has it.
    pub(super) fn idle_machine(&self) -> Result<&Arc<Machine>, Refusal> {
        if self.migration.is_some() {
            Err(Refusal::Migrating)
        } else if self.snapshot.is_some() {
            Err(Refusal::Snapshotting)
        } else {
            self.machine()
        }
    }

    pub(super) fn control(&self) -> Option<&Arc<Control>> {
        match (&self.migration, &self.life) {
            (Some(migration), _) => Some(&migration.job.control),
            (None, Some(Life::Receiving(job))) => Some(&job.control),
            _ => None,
        }
    }

    pub(super) fn info(&self) -> InstanceInfo {
        let machine = match &self.life {
            Some(Life::Here(machine) | Life::InDoubt(machine, _)) => Some(machine),
            Some(Life::Receiving(_)) | None => None,
        };
        let state = match &self.life {
            Some(Life::InDoubt(..)) => InstanceState::InDoubt,
            Some(Life::Here(machine)) if machine.is_held_by(Holder::User) => InstanceState::Paused,
            Some(Life::Here(machine))
                if self.migration.is_none() && machine.is_held_by(Holder::Migration) =>
            {
                InstanceState::Paused
            }
            Some(Life::Here(machine)) if machine.is_held_by(Holder::Startup) => InstanceState::Paused,
            Some(Life::Here(_)) => InstanceState::Running,
            Some(Life::Receiving(_)) | None => InstanceState::Receiving,
        };
        InstanceInfo {
            app_name: "godwit".into(),
            id: self.name.clone(),
            state,
            vmm_version: VERSION.into(),
            pid: std::process::id(),
            vcpu_count: machine.map_or(0, |machine| machine.cpus()),
            mem_size_mib: machine.map_or(0, |machine| machine.memory_size() >> 20),
            cpu_template: machine.map_or_else(String::new, |machine| machine.template().to_string()),
            in_doubt: match &self.life {
                Some(Life::InDoubt(_, side)) => Some(side.describe()),
                _ => None,
            },
            migration: self.control().map(|control| control.progress()),
            snapshot: self.snapshot.as_ref().map(SnapshotJob::progress),
        }
    }

    pub(super) fn pause(&self) -> Result<(), Refusal> {
        self.idle_machine()?.pause_for_user().map_err(failed)
    }

    pub(super) fn resume(&self) -> Result<(), Refusal> {
        let machine = self.idle_machine()?;
        if machine.is_held_by(Holder::Migration) {
            // One that failed could not give the guest back: somebody had its disks.
            machine.take_back().map_err(failed)?;
        }
        machine.resume_for_user();
        Ok(())
    }

    pub(super) fn press_power_button(&self) -> Result<(), Refusal> {
        self.idle_machine()?.press_power_button().map_err(failed)
    }

    pub(super) fn metrics(&self) -> Result<Metrics, Refusal> {
        Ok(Metrics::now(self.machine()?.metrics()))
    }

    pub(super) fn balloon(&self) -> Result<Arc<balloon::Control>, Refusal> {
        self.machine()?.balloon().ok_or(Refusal::NoBalloon)
    }

    /// Asks the guest for so much memory. What the host wants is part of the machine's state, so it can be said until
    /// that is saved.
    pub(super) fn set_balloon(&self, bytes: u64) -> Result<(), Refusal> {
        let machine = self.machine()?;
        let balloon = self.balloon()?;
        if machine.is_held_by(Holder::Migration) {
            return Err(Refusal::Migrating);
        }
        if machine.is_held_by(Holder::Snapshot) {
            return Err(Refusal::Snapshotting);
        }
        let memory = machine.memory_size();
        if bytes > memory {
            return Err(failed(ConfigError::Balloon { got: bytes, memory }));
        }
        balloon.set_target(bytes);
        Ok(())
    }

    /// Looks at a disk's size anew and changes its limits. Size and limits are part of what a destination was told.
    pub(super) fn update_disk(&self, update: &DriveUpdate) -> Result<(), Refusal> {
        let id = &update.drive_id;
        let disk = self
            .idle_machine()?
            .disk(id)
            .ok_or_else(|| Refusal::NoDisk(id.clone()))?;
        let limits = update.limits(disk.limits()).map_err(|source| {
            let id = id.clone();
            failed(ConfigError::Limits { id, source })
        })?;
        update.check_path(disk.path())?;
        disk.resize().map_err(failed)?;
        if limits != disk.limits() {
            disk.set_limits(limits);
        }
        Ok(())
    }

    /// First time: the power button. Second time, or where nobody would hear the button: the end.
    pub(super) fn terminate(&mut self) -> Option<Ending> {
        if self.call_off() {
            return None;
        }
        if self.stop_at.is_some() {
            return Some(Ending::Stopped);
        }
        if let Some(snapshot) = &self.snapshot {
            // A guest that stands still hears no button. A second time does not wait for it.
            snapshot.cancel();
            return std::mem::replace(&mut self.leaving, true).then_some(Ending::Stopped);
        }
        if let Some(migration) = &self.migration {
            migration.job.control.cancel();
        }
        let Ok(machine) = self.machine() else {
            return Some(Ending::Stopped);
        };
        if machine.is_held_by(Holder::User) {
            return Some(Ending::Stopped);
        }
        if let Err(error) = machine.press_power_button() {
            tracing::warn!(%error, "stopping without the power button");
            return Some(Ending::Stopped);
        }
        tracing::info!(
            "asked the guest to shut down; it has {POWER_OFF_GRACE:?}, a second time ends it at once"
        );
        self.stop_at = Some(Instant::now() + POWER_OFF_GRACE);
        None
    }

    /// Calls off waiting for a machine, if that is what goes on. The job then says how it ended: after
    /// "ready" it cannot be called off, and a machine that arrives all the same is the only copy of its guest.
    pub(super) fn call_off(&mut self) -> bool {
        let Some(Life::Receiving(job)) = &self.life else {
            return false;
        };
        job.control.cancel();
        self.leaving = true;
        true
    }
}
