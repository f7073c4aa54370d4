//! How a device tells the machine that the guest wants to end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestExit {
    /// A reset: keyboard controller or ACPI reset register.
    Reset,
    /// A power-off: ACPI sleep state S5.
    PowerOff,
    /// Nothing: its kernel has panicked, and reported that.
    Panic,
}

/// An eventfd and the reason why it was raised, shared by the devices that raise it and the supervisor that waits for
/// it. The first reason wins.
#[derive(Clone, Debug)]
pub struct ExitEvent(Arc<ExitEventInner>);

#[derive(Debug)]
struct ExitEventInner {
    event: EventFd,
    reason: AtomicU8,
}

const NONE: u8 = 0;
const RESET: u8 = 1;
const POWER_OFF: u8 = 2;
const PANIC: u8 = 3;

impl ExitEvent {
    /// A new event, not raised. Fails if the process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(ExitEventInner {
            event: EventFd::new(EFD_NONBLOCK)?,
            reason: AtomicU8::new(NONE),
        })))
    }

    /// Raises the event.
    pub fn raise(&self, exit: GuestExit) {
        let code = match exit {
            GuestExit::Reset => RESET,
            GuestExit::PowerOff => POWER_OFF,
            GuestExit::Panic => PANIC,
        };
        // A second exit changes nothing, whichever thread it comes from.
        let _ = self
            .0
            .reason
            .compare_exchange(NONE, code, Ordering::AcqRel, Ordering::Acquire);
        if let Err(error) = self.0.event.write(1) {
            tracing::error!(%error, "cannot raise the exit event");
        }
    }

    /// Why the event was raised; `None` if it was not.
    pub fn reason(&self) -> Option<GuestExit> {
        match self.0.reason.load(Ordering::Acquire) {
            RESET => Some(GuestExit::Reset),
            POWER_OFF => Some(GuestExit::PowerOff),
            PANIC => Some(GuestExit::Panic),
            _ => None,
        }
    }

    /// Becomes readable when the event is raised and stays so.
    pub fn event(&self) -> &EventFd {
        &self.0.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_wins() {
        let exit = ExitEvent::new().unwrap();
        assert_eq!(exit.reason(), None);
        assert!(exit.event().read().is_err());
        exit.raise(GuestExit::PowerOff);
        exit.clone().raise(GuestExit::Reset);
        assert_eq!(exit.reason(), Some(GuestExit::PowerOff));
        assert_eq!(exit.event().read().unwrap(), 2);
    }
}
