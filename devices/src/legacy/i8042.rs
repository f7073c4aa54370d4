//! The keyboard controller, as far as a machine without keyboard needs it: the reset line.

use migration_state::{Envelope, Record, StateError};
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::exit::{ExitEvent, GuestExit};

/// Offset of the command and status port (0x64) from the data port (0x60).
const COMMAND: u64 = 4;
/// Pulses the output lines named by the low bits that are 0; bit 0 is the CPU's reset line.
const PULSE_RESET: u8 = 0xfe;
/// The next byte at the data port goes to the output port.
const WRITE_OUTPUT_PORT: u8 = 0xd1;
/// The reset line in the output port, active low.
const OUTPUT_NO_RESET: u8 = 1;

/// An i8042 with nothing attached, to be mapped at port 0x60 for 5 ports.
///
/// Reads are 0: no data, ready for a command.
#[derive(Debug)]
pub struct I8042 {
    exit: ExitEvent,
    output_port_next: bool,
}

impl I8042 {
    /// A controller that raises `exit` when the guest pulls the reset line.
    pub fn new(exit: ExitEvent) -> Self {
        Self {
            exit,
            output_port_next: false,
        }
    }

    /// Adds the saved state to `envelope`.
    pub fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), StateError> {
        envelope.put(
            instance,
            &I8042State {
                output_port_next: self.output_port_next,
            },
        )
    }

    /// Takes the saved state out of `envelope`.
    pub fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), StateError> {
        let state: I8042State = envelope.take(instance)?;
        self.output_port_next = state.output_port_next;
        Ok(())
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let resets = match offset {
            COMMAND => {
                self.output_port_next = value == WRITE_OUTPUT_PORT;
                value == PULSE_RESET
            }
            0 => std::mem::take(&mut self.output_port_next) && value & OUTPUT_NO_RESET == 0,
            _ => false,
        };
        if resets {
            self.exit.raise(GuestExit::Reset);
        }
    }
}

/// Saved state of [`I8042`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// The next byte at the data port goes to the output port.
    pub output_port_next: bool,
}

impl Record for I8042State {
    const KIND: &'static str = "i8042";
    const VERSION: u16 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_line_resets() {
        let exit = ExitEvent::new().unwrap();
        let mut controller = I8042::new(exit.clone());
        let mut data = [0xff; 8];
        controller.read(COMMAND, &mut data);
        assert_eq!(data, [0; 8]);
        controller.write(0, &[0xfe]);
        controller.write(COMMAND, &[0xfe, 0xfe]);
        controller.write(COMMAND, &[]);
        controller.write(COMMAND, &[WRITE_OUTPUT_PORT]);
        controller.write(0, &[0xdf]);
        controller.write(0, &[0]);
        assert_eq!(exit.reason(), None);
        controller.write(COMMAND, &[PULSE_RESET]);
        assert_eq!(exit.reason(), Some(GuestExit::Reset));
    }

    #[test]
    fn a_command_survives_between_its_two_bytes() {
        let mut source = I8042::new(ExitEvent::new().unwrap());
        source.write(COMMAND, &[WRITE_OUTPUT_PORT]);
        let mut envelope = Envelope::new();
        source.save(&mut envelope, "i8042").unwrap();

        let exit = ExitEvent::new().unwrap();
        let mut destination = I8042::new(exit.clone());
        destination.restore(&mut envelope, "i8042").unwrap();
        destination.write(0, &[0xde]);
        assert_eq!(exit.reason(), Some(GuestExit::Reset));
    }

    #[test]
    fn golden_record() {
        migration_state::assert_golden(
            1,
            "01",
            &I8042State {
                output_port_next: true,
            },
        );
    }
}
