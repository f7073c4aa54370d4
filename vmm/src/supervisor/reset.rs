//! Boots a guest again in the same process after it has reset, by building a new machine. The old machine must be gone
//! first: the new one needs its disks, taps and sockets.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use devices::GuestExit;

use super::restore::RestoreWait;
use super::{Ending, Life, Supervisor, SupervisorError};
use crate::machine::{EventSink, Machine, MachineError};

/// A guest that resets before it has run for this long has reset too early: each further boot is delayed more.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// The first delay; each further one is twice as long.
const FIRST_DELAY: Duration = Duration::from_secs(1);
/// How often the delay doubles at most: up to half a minute.
const DOUBLINGS: u32 = 5;

/// Builds a machine like the one that reset. Its guest does not run yet.
pub type Boot = Arc<dyn Fn(EventSink) -> Result<Machine, MachineError> + Send + Sync>;

/// How to build the machine anew, and when the guest was booted before.
pub(super) struct Reboot {
    boot: Boot,
    /// When the present guest was booted.
    since: Instant,
    /// How often it has reset too early in a row.
    early_resets: u32,
}

impl Reboot {
    /// How long to delay the next boot: a guest that resets again and again must not keep the host busy.
    fn next_delay(&mut self, now: Instant) -> Duration {
        let is_stable = now.saturating_duration_since(self.since) >= STABLE_AFTER;
        self.early_resets = if is_stable {
            0
        } else {
            self.early_resets.saturating_add(1)
        };
        match self.early_resets {
            0 => Duration::ZERO,
            resets => FIRST_DELAY * 2u32.pow((resets - 1).min(DOUBLINGS)),
        }
    }
}

impl Supervisor {
    /// From here on a guest that resets is booted again, by `boot`, instead of ending the VM.
    pub fn boot_on_reset(&mut self, boot: Boot) {
        self.reboot = Some(Reboot {
            boot,
            since: Instant::now(),
            early_resets: 0,
        });
    }

    /// Handles a reset of the guest. A job that has the machine ends first, which it does soon: a guest that has reset
    /// is neither migrated nor saved.
    pub(super) fn reset(&mut self) -> Option<Result<Ending, SupervisorError>> {
        let ending = Some(Ok(Ending::Guest(GuestExit::Reset)));
        if self.stop_at.is_some() || self.leaving {
            return ending;
        }
        let Some(reboot) = &mut self.reboot else {
            return ending;
        };
        self.resetting = self.migration.is_some() || self.snapshot.is_some() || self.operation.is_some();
        if self.resetting {
            if let Some(migration) = &self.migration {
                migration.job.control.cancel();
            }
            if let Some(snapshot) = &self.snapshot {
                snapshot.cancel();
            }
            return None;
        }
        let machine = match self.life.take() {
            Some(Life::Here(machine)) => machine,
            other => {
                self.life = other;
                return ending;
            }
        };
        let delay = reboot.next_delay(Instant::now());
        let boot = reboot.boot.clone();
        tracing::info!("the guest has reset: booting it again in {delay:?}");
        let events = self.event_sink();
        let (called_off, waiting) = mpsc::channel::<()>();
        let make = move || {
            // The old machine's disks, taps and sockets are free only once it is gone.
            drop(machine);
            match waiting.recv_timeout(delay) {
                Err(mpsc::RecvTimeoutError::Timeout) => boot(events),
                _ => Err(MachineError::CalledOff),
            }
        };
        match self.make_machine(make, RestoreWait::Bounded, Some(called_off), || {}) {
            Ok(()) => None,
            Err(error) => Some(Err(SupervisorError::Restore(error.to_string()))),
        }
    }

    /// Resets the machine now, if a reset was waiting for a job that has ended.
    pub(super) fn reset_now(&mut self) -> Option<Result<Ending, SupervisorError>> {
        if self.resetting { self.reset() } else { None }
    }

    /// Starts the guest of the new machine. Before the supervisor owned the machine, a reset of it would have been
    /// lost.
    pub(super) fn booted(&mut self) {
        if let (Some(reboot), Some(Life::Here(machine))) = (&mut self.reboot, &self.life) {
            reboot.since = Instant::now();
            machine.start();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_resets_at_once_is_booted_ever_later() {
        let began = Instant::now();
        let mut reboot = Reboot {
            boot: Arc::new(|_| Err(MachineError::CalledOff)),
            since: began,
            early_resets: 0,
        };
        let delays: Vec<_> = (0..8).map(|_| reboot.next_delay(began).as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 32, 32]);
        assert_eq!(reboot.next_delay(began + STABLE_AFTER), Duration::ZERO);
        assert_eq!(reboot.next_delay(began), FIRST_DELAY);
    }
}
