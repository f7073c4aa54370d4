//! Devices that are not virtio: the serial port and the ways to reset and power off a PC.

mod acpi;
mod i8042;
mod serial;

pub use acpi::{AcpiPower, AcpiPowerState};
pub use i8042::{I8042, I8042State};
pub use serial::{INPUT_LIMIT, Serial, SerialError, SerialState};
