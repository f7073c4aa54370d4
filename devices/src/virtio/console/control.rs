//! Messages in the control queues (virtio 1.2, 5.3.6.2).

use super::terminal::TerminalSize;

/// Bytes of a message without the name or the size that follows some.
pub(super) const MESSAGE_LEN: usize = 8;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// A message from the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DriverMessage {
    /// The driver is ready, or, if false, has failed.
    Device(bool),
    /// The driver has accepted the port, or could not.
    Ready(u32, bool),
    /// A program in the guest has opened the port, or closed it.
    Open(u32, bool),
}

impl DriverMessage {
    /// Parses a message; `None` for one that a driver must not send.
    pub(super) fn decode(bytes: &[u8; MESSAGE_LEN]) -> Option<Self> {
        let [a, b, c, d, event_low, event_high, value_low, value_high] = *bytes;
        let port = u32::from_le_bytes([a, b, c, d]);
        let value = match u16::from_le_bytes([value_low, value_high]) {
            0 => false,
            1 => true,
            _ => return None,
        };
        match u16::from_le_bytes([event_low, event_high]) {
            DEVICE_READY => Some(Self::Device(value)),
            PORT_READY => Some(Self::Ready(port, value)),
            PORT_OPEN => Some(Self::Open(port, value)),
            _ => None,
        }
    }
}

/// A message to the driver about a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DeviceMessage {
    /// The port exists.
    Add,
    /// The port is a console.
    Console,
    /// The port has this name.
    Name(String),
    /// The host side has been opened, or closed.
    Open(bool),
    /// The console's terminal has this size.
    Resize(TerminalSize),
}

impl DeviceMessage {
    /// The message's bytes, for the port `port`.
    pub(super) fn encode(&self, port: u32) -> Vec<u8> {
        let mut more = Vec::new();
        let (event, value) = match self {
            Self::Add => (PORT_ADD, 0),
            Self::Console => (CONSOLE_PORT, 1),
            Self::Name(name) => {
                more.extend(name.as_bytes());
                (PORT_NAME, 1)
            }
            Self::Open(open) => (PORT_OPEN, u16::from(*open)),
            Self::Resize(TerminalSize { columns, rows }) => {
                // The specification has columns first, and so has Linux since 2025; before, it read the rows first.
                more.extend(columns.to_le_bytes());
                more.extend(rows.to_le_bytes());
                (RESIZE, 0)
            }
        };
        let event: u16 = event;
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        bytes.append(&mut more);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_its_place() {
        let size = TerminalSize {
            columns: 132,
            rows: 43,
        };
        for (message, bytes) in [
            (DeviceMessage::Add, &[2, 1, 0, 0, 1, 0, 0, 0][..]),
            (DeviceMessage::Console, &[2, 1, 0, 0, 4, 0, 1, 0]),
            (
                DeviceMessage::Name("ab".into()),
                &[2, 1, 0, 0, 7, 0, 1, 0, b'a', b'b'],
            ),
            (DeviceMessage::Open(true), &[2, 1, 0, 0, 6, 0, 1, 0]),
            (DeviceMessage::Open(false), &[2, 1, 0, 0, 6, 0, 0, 0]),
            (
                DeviceMessage::Resize(size),
                &[2, 1, 0, 0, 5, 0, 0, 0, 132, 0, 43, 0],
            ),
        ] {
            assert_eq!(message.encode(0x102), bytes);
        }
    }

    #[test]
    fn only_what_a_driver_says_is_understood() {
        let decode =
            |port: u8, event: u8, value: u8| DriverMessage::decode(&[port, 0, 0, 1, event, 0, value, 0]);
        assert_eq!(decode(0, 0, 1), Some(DriverMessage::Device(true)));
        assert_eq!(decode(7, 3, 0), Some(DriverMessage::Ready(0x0100_0007, false)));
        assert_eq!(decode(7, 6, 1), Some(DriverMessage::Open(0x0100_0007, true)));
        for (event, value) in [(0, 2), (1, 0), (2, 0), (4, 1), (5, 0), (7, 1), (8, 0), (255, 1)] {
            assert_eq!(decode(0, event, value), None, "event {event}, value {value}");
        }
    }
}
