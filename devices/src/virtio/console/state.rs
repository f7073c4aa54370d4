//! Saved state of the console device, and its check.

use migration_state::Record;
use serde::{Deserialize, Serialize};

use super::terminal::{INPUT_LIMIT, TerminalSize};
use crate::virtio::DeviceError;

/// Saved state of a [`super::VirtioConsole`]. Programs on the host that have connected are not in it: they do not move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// The ports by number; the first is the console.
    pub ports: Vec<PortState>,
    /// The terminal's size as the guest knows it.
    pub size: Option<TerminalSize>,
    /// What was typed and waits for the guest.
    pub input: Vec<u8>,
}

/// Saved state of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// Its name; empty for the console.
    pub name: String,
    /// The guest is to be told that it is there.
    pub add: bool,
    /// The guest is to be told what it is.
    pub introduce: bool,
    /// The guest has made something of it.
    pub ready: bool,
    /// A program in the guest has it open.
    pub guest_open: bool,
    /// Whether somebody on the host has it open, as the guest knows it.
    pub host_open: bool,
    /// The host has a part of the first chain of the guest's that waits; nobody wants the rest.
    pub cut: bool,
}

impl Record for ConsoleState {
    const KIND: &'static str = "virtio-console";
    const VERSION: u16 = 1;
}

impl ConsoleState {
    /// Checks that the guest finds its ports again, and that nothing is larger than it ever gets.
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
