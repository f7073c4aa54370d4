//! Requests about the machine while it stays in this process: state, power button, balloon, and the end of the VM.
//!
//! A copy that is in doubt is not given up at the first request for the end: it may be the only one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::VERSION;
use api::{InstanceInfo, InstanceState, Metrics};
use devices::virtio::balloon;
use migration::Control;

use super::request::{NEVER, Reply};
use super::{Ending, Life, Operation, Refusal, SnapshotJob, Supervisor, answer, failed};
use crate::config::ConfigError;
use crate::machine::Machine;
use crate::vcpu::Holder;

impl Supervisor {
    /// The machine, if it is here and not in doubt.
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

    /// The control of the migration under way, away or to here.
    pub(super) fn control(&self) -> Option<&Arc<Control>> {
        match (&self.migration, &self.life) {
            (Some(migration), _) => Some(&migration.job.control),
            (None, Some(Life::Receiving(job))) => Some(&job.control),
            _ => None,
        }
    }

    /// What the API shows of this VM.
    pub(super) fn info(&self) -> InstanceInfo {
        let machine = match &self.life {
            Some(Life::Here(machine) | Life::InDoubt(machine, _)) => Some(machine),
            Some(Life::Receiving(_)) | None => None,
        };
        let pausing = self.operation.as_ref().is_some_and(Operation::is_pause);
        let state = match &self.life {
            Some(Life::InDoubt(..)) => InstanceState::InDoubt,
            Some(Life::Here(machine)) if machine.is_held_by(Holder::User) && !pausing => {
                InstanceState::Paused
            }
            Some(Life::Here(machine))
                if self.migration.is_none() && machine.is_held_by(Holder::Migration) =>
            {
                InstanceState::Paused
            }
            Some(Life::Here(machine)) if machine.is_held_by(Holder::Startup) => InstanceState::Paused,
            Some(Life::Here(_)) => InstanceState::Running,
            None if self.reboot.is_some() => InstanceState::NotStarted,
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
            prefetch: machine.and_then(|machine| machine.prefetch_progress()),
            stop_timeout_ms: u64::try_from(self.stop_timeout.as_millis()).unwrap_or(u64::MAX),
            log: self.log.clone(),
        }
    }

    pub(super) fn press_power_button(&self) -> Result<(), Refusal> {
        self.idle_machine()?.press_power_button().map_err(failed)
    }

    pub(super) fn metrics(&self) -> Result<Metrics, Refusal> {
        Ok(Metrics::now(self.machine()?.metrics()))
    }

    pub(super) fn balloon(&self) -> Result<Arc<balloon::BalloonControl>, Refusal> {
        self.machine()?.balloon().ok_or(Refusal::NoBalloon)
    }

    /// Asks the guest to give up this much memory. The target is part of the machine's state, so it can be changed
    /// until the state is saved.
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

    /// Handles a signal or key that asks for the end: the first one presses the power button, a second one ends the VM.
    /// So does the first one if the guest cannot react to the button.
    pub(super) fn terminate(&mut self) -> Option<Ending> {
        if self.cancel_receiving() {
            return None;
        }
        if let Some(Life::InDoubt(_, side)) = &self.life {
            if self.end_confirmation.is_confirmed(Instant::now()) {
                return Some(Ending::Stopped);
            }
            tracing::error!(
                "in doubt, and this may be the only copy of the guest, so the VM does not end: {}. Asked for the end again, it throws this copy away",
                side.describe()
            );
            return None;
        }
        if self.stop_at.is_some() {
            return self.leave();
        }
        if let Some(snapshot) = &self.snapshot {
            // A paused guest does not react to the button, and a second request does not wait for it.
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
            return self.leave();
        }
        if let Err(error) = machine.press_power_button() {
            tracing::warn!(%error, "stopping without the power button");
            return self.leave();
        }
        let grace = self.stop_timeout;
        tracing::info!("asked the guest to shut down; it has {grace:?}, a second time ends it at once");
        // A time beyond the clock's end never comes.
        self.stop_at = Some(Instant::now().checked_add(grace).unwrap_or_else(far_future));
        None
    }

    /// Ends the VM at once, without asking the guest.
    pub(super) fn stop(&mut self, force: bool, reply: Reply<()>) -> Option<Ending> {
        if !force && matches!(self.life, Some(Life::InDoubt(..))) {
            answer(reply, Err(Refusal::InDoubtStays));
            return None;
        }
        answer(reply, Ok(()));
        if self.cancel_receiving() {
            None
        } else if force {
            Some(Ending::Stopped)
        } else {
            self.leave()
        }
    }

    /// Ends the VM, whose guest did not shut down in time.
    pub(super) fn grace_over(&mut self) -> Option<Ending> {
        let grace = self.stop_timeout;
        tracing::info!("the guest did not shut down within {grace:?}: stopping it");
        self.leave()
    }

    /// Ends the VM once it is known where the guest is: a migration that is cancelled may have switched already, and a
    /// machine that it leaves in doubt may be the only copy.
    pub(super) fn leave(&mut self) -> Option<Ending> {
        self.stop_at = None;
        match (&self.migration, &self.life) {
            (Some(migration), _) => {
                migration.job.control.cancel();
                self.leaving = true;
                None
            }
            (None, Some(Life::InDoubt(..))) => self.terminate(),
            (None, _) => Some(Ending::Stopped),
        }
    }

    /// Cancels the receiving job, if there is one, and returns whether there is. The job's event then says how it
    /// ended: after "ready" it cannot be cancelled, and a machine that arrives all the same is the only copy of its
    /// guest.
    pub(super) fn cancel_receiving(&mut self) -> bool {
        let Some(Life::Receiving(job)) = &self.life else {
            return false;
        };
        job.control.cancel();
        self.leaving = true;
        true
    }
}

fn far_future() -> Instant {
    Instant::now() + NEVER
}

/// Decides whether a request for the end confirms an earlier one: a request that follows at once belongs to the first (a service
/// manager sends two signals, a key repeats), and one that comes much later may come from a user who does not know of
/// the first.
#[derive(Debug, Default)]
pub(super) struct EndConfirmation(Option<Instant>);

impl EndConfirmation {
    /// When a second request counts, after the first.
    const SECOND: std::ops::Range<Duration> = Duration::from_secs(1)..Duration::from_secs(60);

    /// Whether a request that comes `now` is the second.
    fn is_confirmed(&mut self, now: Instant) -> bool {
        let since = self.0.map(|first| now.saturating_duration_since(first));
        match since {
            Some(since) if Self::SECOND.contains(&since) => true,
            Some(since) if since < Self::SECOND.start => false,
            _ => {
                self.0 = Some(now);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_for_the_end_is_not_two() {
        let mut alarm = EndConfirmation::default();
        let first = Instant::now();
        let after = |ms| first + Duration::from_millis(ms);
        assert!(!alarm.is_confirmed(first));
        assert!(!alarm.is_confirmed(after(20)) && !alarm.is_confirmed(after(999)));
        assert!(alarm.is_confirmed(after(1000)) && alarm.is_confirmed(after(59_999)));
        assert!(!alarm.is_confirmed(after(3_600_000)));
        assert!(alarm.is_confirmed(after(3_602_000)));
    }
}
