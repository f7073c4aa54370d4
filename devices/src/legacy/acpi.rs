//! Power control of a hardware-reduced ACPI machine (ACPI 6.5, 4.8.3.7 and 4.8.3.6): sleep control and status,
//! the reset register, and a power button that a Generic Event Device reports.

use migration_state::{Envelope, Record, StateError};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::exit::{ExitEvent, GuestExit};

const SLEEP_CONTROL: u64 = 0;
const SLEEP_STATUS: u64 = 1;
const RESET: u64 = 2;

const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111 << SLP_TYP_SHIFT;
/// The wake status bit of the sleep status register; a 1 written to it clears it.
const WAK_STS: u8 = 1 << 7;

/// The register block, three byte-wide ports, and the power button.
#[derive(Debug)]
pub struct AcpiPower {
    exit: ExitEvent,
    button: EventFd,
    sleep_control: u8,
}

impl AcpiPower {
    /// Ports that the block takes.
    pub const LEN: u64 = 3;
    /// Value of SLP_TYP that powers off, for the `_S5` package.
    pub const SLEEP_TYPE_S5: u8 = 5;
    /// Value of the reset register that resets, for the FADT.
    pub const RESET_VALUE: u8 = 1;

    /// A block that raises `exit`, with a power button that interrupts through `button`.
    pub fn new(exit: ExitEvent, button: EventFd) -> Self {
        Self {
            exit,
            button,
            sleep_control: 0,
        }
    }

    /// Presses the power button. The guest decides what to do.
    pub fn press(&self) -> std::io::Result<()> {
        self.button.write(1)
    }

    /// Adds the saved state to `envelope`.
    pub fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), StateError> {
        envelope.put(
            instance,
            &AcpiPowerState {
                sleep_control: self.sleep_control,
            },
        )
    }

    /// Takes the saved state out of `envelope`.
    pub fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), StateError> {
        let state: AcpiPowerState = envelope.take(instance)?;
        self.sleep_control = state.sleep_control & SLP_TYP_MASK;
        Ok(())
    }
}

impl BusDevice for AcpiPower {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([value, ..], SLEEP_CONTROL) = (data, offset) {
            *value = self.sleep_control;
        }
        // Sleep status: the machine never sleeps, so the wake bit never sets.
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            SLEEP_CONTROL => {
                // SLP_EN reads as 0.
                self.sleep_control = value & SLP_TYP_MASK;
                if value & SLP_EN == 0 {
                    return;
                }
                let sleep_type = self.sleep_control >> SLP_TYP_SHIFT;
                if sleep_type == Self::SLEEP_TYPE_S5 {
                    self.exit.raise(GuestExit::PowerOff);
                } else {
                    tracing::debug!(sleep_type, "the guest asked for a sleep state that there is not");
                }
            }
            SLEEP_STATUS if value & !WAK_STS != 0 => {
                tracing::debug!(
                    value,
                    "the guest wrote reserved bits of the sleep status register"
                );
            }
            RESET if value == Self::RESET_VALUE => self.exit.raise(GuestExit::Reset),
            _ => {}
        }
    }
}

/// Saved state of [`AcpiPower`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPowerState {
    /// The sleep control register.
    pub sleep_control: u8,
}

impl Record for AcpiPowerState {
    const KIND: &'static str = "acpi-power";
    const VERSION: u16 = 1;
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn block() -> (AcpiPower, ExitEvent, EventFd) {
        let exit = ExitEvent::new().unwrap();
        let button = EventFd::new(EFD_NONBLOCK).unwrap();
        (
            AcpiPower::new(exit.clone(), button.try_clone().unwrap()),
            exit,
            button,
        )
    }

    #[test]
    fn power_off_needs_both_the_type_and_the_enable_bit() {
        let (mut power, exit, _) = block();
        power.write(SLEEP_CONTROL, &[5 << 2]);
        power.write(SLEEP_CONTROL, &[SLP_EN | 3 << 2]);
        power.write(SLEEP_STATUS, &[0xff]);
        power.write(RESET, &[0]);
        power.write(RESET, &[1, 1]);
        power.write(17, &[1]);
        assert_eq!(exit.reason(), None);
        power.write(SLEEP_CONTROL, &[SLP_EN | 5 << 2]);
        assert_eq!(exit.reason(), Some(GuestExit::PowerOff));
    }

    #[test]
    fn the_reset_register_resets() {
        let (mut power, exit, _) = block();
        power.write(RESET, &[1]);
        assert_eq!(exit.reason(), Some(GuestExit::Reset));
    }

    #[test]
    fn the_button_interrupts() {
        let (power, exit, button) = block();
        power.press().unwrap();
        assert_eq!(button.read().unwrap(), 1);
        assert_eq!(exit.reason(), None);
    }

    #[test]
    fn state_moves_and_reads_take_any_size() {
        let (mut power, _, _) = block();
        power.write(SLEEP_CONTROL, &[5 << 2]);
        let mut envelope = Envelope::new();
        power.save(&mut envelope, "acpi").unwrap();
        let (mut other, _, _) = block();
        other.restore(&mut envelope, "acpi").unwrap();
        let mut data = [0xff; 8];
        other.read(SLEEP_CONTROL, &mut data);
        assert_eq!(data, [5 << 2, 0, 0, 0, 0, 0, 0, 0]);
        other.read(SLEEP_CONTROL, &mut []);
    }

    #[test]
    fn golden_record() {
        migration_state::assert_golden(1, "14", &AcpiPowerState { sleep_control: 0x14 });
    }
}
