//! Devices that are not virtio: the serial port, the ways to reset and power off a PC, and the panic notifier.

mod acpi;
mod i8042;
mod pvpanic;
mod serial;

pub use acpi::{AcpiPower, AcpiPowerState};
pub use i8042::{I8042, I8042State};
pub use pvpanic::PvPanic;
pub use serial::{INPUT_LIMIT, Serial, SerialError, SerialState};
