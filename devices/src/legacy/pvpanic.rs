//! The panic notifier (QEMU, docs/specs/pvpanic.rst), by which a guest's kernel reports that it has panicked.

use crate::bus::BusDevice;
use crate::exit::{ExitEvent, GuestExit};
use crate::log_damper::LogDamper;

/// The guest's kernel panicked and has stopped.
const PANICKED: u8 = 1 << 0;
/// The guest's kernel panicked and starts its crash kernel.
const CRASH_LOADED: u8 = 1 << 1;
/// The guest asks for a power-off.
const SHUTDOWN: u8 = 1 << 2;

/// One port: the guest reads which events the device knows, and writes those that have happened. The device has no
/// state to save.
#[derive(Debug)]
pub struct PvPanic {
    exit: ExitEvent,
    warnings: LogDamper,
}

impl PvPanic {
    /// Number of ports.
    pub const LEN: u64 = 1;

    /// A notifier that raises `exit`.
    pub fn new(exit: ExitEvent) -> Self {
        Self {
            exit,
            warnings: LogDamper::default(),
        }
    }
}

impl BusDevice for PvPanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [events, ..] = data {
            *events = PANICKED | CRASH_LOADED | SHUTDOWN;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let &[events] = data else { return };
        if events & PANICKED != 0 {
            self.exit.raise(GuestExit::Panic);
        } else if events & SHUTDOWN != 0 {
            self.exit.raise(GuestExit::PowerOff);
        } else if let Some(count) = self.warnings.count() {
            if events & CRASH_LOADED != 0 {
                tracing::warn!(count, "the guest panicked, and goes on into its crash kernel");
            } else {
                tracing::debug!(count, events, "the guest reported events that are not known here");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_event_has_its_end() {
        for (written, expected) in [
            (&[PANICKED][..], Some(GuestExit::Panic)),
            (&[PANICKED | CRASH_LOADED], Some(GuestExit::Panic)),
            (&[SHUTDOWN], Some(GuestExit::PowerOff)),
            (&[CRASH_LOADED], None),
            (&[0xf8], None),
            (&[0], None),
            (&[PANICKED, 0], None),
            (&[], None),
        ] {
            let exit = ExitEvent::new().unwrap();
            PvPanic::new(exit.clone()).write(0, written);
            assert_eq!(exit.reason(), expected, "{written:?}");
        }
    }

    #[test]
    fn the_guest_is_told_what_it_can_report() {
        let mut notifier = PvPanic::new(ExitEvent::new().unwrap());
        let mut data = [0xff; 4];
        notifier.read(0, &mut data);
        assert_eq!(data, [7, 0, 0, 0]);
        notifier.read(0, &mut []);
    }
}
