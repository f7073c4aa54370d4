//! Saved state of the console device, and its check.

use migration_state::Record;
use serde::{Deserialize, Serialize};

use super::terminal::{INPUT_LIMIT, TerminalSize};
use crate::virtio::DeviceError;

/// Saved state of a [`super::VirtioConsole`]. Connected programs on the host are not in it: they do not move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// The ports by number; the first is the console.
    pub ports: Vec<PortState>,
    /// The terminal's size as the guest knows it.
    pub size: Option<TerminalSize>,
    /// Input that waits for the guest.
    pub input: Vec<u8>,
}

/// Saved state of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// Its name; empty for the console.
    pub name: String,
    /// The guest has not been sent PORT_ADD yet.
    pub add: bool,
    /// The guest has not been sent the port's name or CONSOLE_PORT yet.
    pub introduce: bool,
    /// The guest has accepted the port.
    pub ready: bool,
    /// A program in the guest has it open.
    pub guest_open: bool,
    /// Whether the host side is open, as the guest knows it.
    pub host_open: bool,
    /// The host's program got a part of the first chain that waits, and the rest is dropped.
    pub cut: bool,
}

impl Record for ConsoleState {
    const KIND: &'static str = "virtio-console";
    const VERSION: u16 = 1;
}

impl ConsoleState {
    /// Checks that the ports here match those that the guest knows, and that the input is not larger than allowed.
    pub(super) fn check<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<(), DeviceError> {
        let mismatch = |what, expected, got| Err(DeviceError::Mismatch { what, expected, got });
        let expected: Vec<&str> = names.collect();
        let got: Vec<&str> = self.ports.iter().map(|port| port.name.as_str()).collect();
        if got != expected {
            return mismatch("ports", format!("{expected:?}"), format!("{got:?}"));
        }
        let got = self.input.len();
        if got > INPUT_LIMIT {
            return mismatch(
                "waiting input",
                format!("at most {INPUT_LIMIT} bytes"),
                got.to_string(),
            );
        }
        Ok(())
    }
}
