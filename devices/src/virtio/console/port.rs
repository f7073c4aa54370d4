//! One port: its host side, and how much of the guest's next chain was sent.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::control::DeviceMessage;
use super::metrics::ConsoleMetrics;
use super::state::PortState;
use super::terminal::ConsoleTerminal;
use crate::GuestMemory;
use crate::log_damper::LogDamper;
use crate::virtio::{Chain, QueueAccess, QueueError, QueueProgress};

/// Most chains that one turn of a port serves, each way.
const PORT_TURN_CHAINS: usize = 64;
/// Most bytes that one turn of a port moves, each way.
const PORT_TURN_BYTES: usize = 256 << 10;
/// The value of `sent` for a chain whose rest is dropped.
const SENT_ALL: usize = usize::MAX;

/// A port.
#[derive(Debug)]
pub(super) struct ConsolePort {
    pub(super) name: String,
    pub(super) host: PortPeer,
    /// PORT_ADD must be sent to the guest.
    pub(super) add: bool,
    /// The port's name or CONSOLE_PORT must be sent to the guest.
    pub(super) introduce: bool,
    /// The guest has accepted the port.
    pub(super) ready: bool,
    /// A program in the guest has it open.
    pub(super) guest_open: bool,
    /// Whether the guest knows that the host side is open.
    pub(super) host_open: bool,
    /// Bytes of the guest's next chain that were sent to the host, or [`SENT_ALL`].
    sent: usize,
    metrics: Arc<ConsoleMetrics>,
    warnings: LogDamper,
}

/// The host side of a port.
#[derive(Debug)]
pub(super) enum PortPeer {
    /// The machine's terminal, which is always open.
    Terminal(Arc<ConsoleTerminal>),
    /// The program that has connected, if one has.
    Program(Option<Program>),
}

#[derive(Debug)]
pub(super) struct Program {
    stream: UnixStream,
    /// It has closed; there may be data left to read.
    gone: bool,
}

impl ConsolePort {
    pub(super) fn new(name: String, host: PortPeer, metrics: Arc<ConsoleMetrics>) -> Self {
        Self {
            name,
            host,
            add: false,
            introduce: false,
            ready: false,
            guest_open: false,
            host_open: false,
            sent: 0,
            metrics,
            warnings: LogDamper::default(),
        }
    }

    /// Whether the host side is open.
    pub(super) fn has_host(&self) -> bool {
        !matches!(self.host, PortPeer::Program(None))
    }

    /// Whether the next program may connect: the guest must have been told that the last one has gone.
    pub(super) fn can_accept_program(&self) -> bool {
        !self.has_host() && !self.host_open
    }

    /// A program has connected.
    pub(super) fn connect(&mut self, stream: UnixStream) {
        self.metrics.connections.add(1);
        self.host = PortPeer::Program(Some(Program { stream, gone: false }));
    }

    /// The program on the host has closed. What it has sent stays readable for the guest.
    pub(super) fn hang_up(&mut self) {
        if let PortPeer::Program(Some(program)) = &mut self.host {
            program.gone = true;
        }
        self.discard_rest();
    }

    /// Disconnects a program that has closed if no program in the guest has the port open.
    pub(super) fn release_closed_program(&mut self) {
        if let PortPeer::Program(Some(Program { gone: true, .. })) = self.host
            && !self.guest_open
        {
            self.disconnect();
        }
    }

    /// Resets the port. A program stays connected, except one that has got a part of a chain.
    pub(super) fn reset(&mut self) {
        if self.sent > 0 {
            self.disconnect();
        }
        (self.add, self.introduce, self.ready) = (false, false, false);
        (self.guest_open, self.host_open) = (false, false);
        self.sent = 0;
    }

    /// The driver is ready and is sent all ports.
    pub(super) fn announce(&mut self) {
        self.add = true;
        self.set_ready(false);
    }

    /// The guest has accepted the port, or could not.
    pub(super) fn set_ready(&mut self, ready: bool) {
        (self.ready, self.introduce) = (ready, ready);
        (self.guest_open, self.host_open) = (false, false);
    }

    /// The next control message for the guest about this port.
    pub(super) fn next_control_message(&self) -> Option<DeviceMessage> {
        if self.add {
            Some(DeviceMessage::Add)
        } else if !self.ready {
            None
        } else if self.introduce {
            Some(match &self.host {
                PortPeer::Terminal(_) => DeviceMessage::Console,
                PortPeer::Program(_) => DeviceMessage::Name(self.name.clone()),
            })
        } else {
            let has_host = self.has_host();
            (has_host != self.host_open).then_some(DeviceMessage::Open(has_host))
        }
    }

    /// Notes that a control message was sent.
    pub(super) fn control_message_sent(&mut self, message: &DeviceMessage) {
        match message {
            DeviceMessage::Add => self.add = false,
            DeviceMessage::Console | DeviceMessage::Name(_) => self.introduce = false,
            DeviceMessage::Open(open) => self.host_open = *open,
            DeviceMessage::Resize(_) => {}
        }
    }

    /// Fills the guest's chains with data from the host side, by way of `room`.
    pub(super) fn process_receive_queue(
        &mut self,
        queue: &mut QueueAccess<'_>,
        room: &mut [u8],
    ) -> Result<QueueProgress, QueueError> {
        let (mut chains, mut bytes) = (0, 0);
        let progress = loop {
            if !self.guest_open || !self.has_host() {
                break QueueProgress::Idle;
            }
            if chains == PORT_TURN_CHAINS || bytes >= PORT_TURN_BYTES {
                break QueueProgress::More;
            }
            let Some((head, chain)) = queue.pop()? else {
                break QueueProgress::Idle;
            };
            let written = match chain {
                Ok(chain) if !chain.writable.is_empty() => self.fill_chain(queue.memory(), chain, room),
                Ok(_) => {
                    self.warn("no room in a buffer for the guest");
                    Some(0)
                }
                Err(error) => {
                    self.warn(error);
                    Some(0)
                }
            };
            let Some(written) = written else {
                queue.undo_pop();
                break QueueProgress::Idle;
            };
            // At most `room`, which fits.
            queue.add_used(head, written as u32)?;
            chains += 1;
            bytes += written;
        };
        if chains > 0 {
            queue.notify()?;
        }
        Ok(progress)
    }

    /// Fills a chain; returns its bytes, or `None` if the host side has no data.
    fn fill_chain(&mut self, memory: &GuestMemory, mut chain: Chain, room: &mut [u8]) -> Option<usize> {
        let most = usize::try_from(chain.writable.len()).unwrap_or(usize::MAX);
        let most = room.len().min(most);
        let count = self.read_host(&mut room[..most])?;
        match chain.writable.fill(memory, &room[..count]) {
            Ok(filled) => {
                self.metrics.rx_bytes.add(filled as u64);
                Some(filled)
            }
            Err(error) => {
                // The bytes are lost: the driver's buffer is not in memory.
                self.warn(error);
                Some(0)
            }
        }
    }

    fn read_host(&mut self, room: &mut [u8]) -> Option<usize> {
        let program = match &mut self.host {
            PortPeer::Terminal(terminal) => {
                let count = terminal.read_input(room);
                return (count > 0).then_some(count);
            }
            PortPeer::Program(program) => program.as_mut()?,
        };
        loop {
            match program.stream.read(room) {
                Ok(count @ 1..) => return Some(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => {
                    self.disconnect();
                    return None;
                }
            }
        }
    }

    /// Sends the guest's chains to the host, as far as the host side takes them.
    pub(super) fn process_transmit_queue(
        &mut self,
        queue: &mut QueueAccess<'_>,
        room: &mut [u8],
    ) -> Result<QueueProgress, QueueError> {
        let (mut chains, mut budget) = (0, PORT_TURN_BYTES);
        let progress = loop {
            if !self.can_send() {
                break QueueProgress::Idle;
            }
            if chains == PORT_TURN_CHAINS || budget == 0 {
                break QueueProgress::More;
            }
            let Some((head, chain)) = queue.pop()? else {
                break QueueProgress::Idle;
            };
            let is_done = match chain {
                Ok(chain) => self.send_chain(queue.memory(), chain, room, &mut budget),
                Err(error) => {
                    self.warn(error);
                    true
                }
            };
            if is_done {
                self.sent = 0;
                queue.add_used(head, 0)?;
                chains += 1;
                continue;
            }
            queue.undo_pop();
            if budget > 0 && self.sent != SENT_ALL {
                // The program's socket is full, or the program has gone.
                break QueueProgress::Idle;
            }
        };
        if chains > 0 {
            queue.notify()?;
        }
        Ok(progress)
    }

    fn can_send(&self) -> bool {
        match &self.host {
            PortPeer::Terminal(_) => true,
            PortPeer::Program(program) => {
                self.sent == SENT_ALL || program.as_ref().is_some_and(|program| !program.gone)
            }
        }
    }

    /// Sends a chain's data; returns whether all of it was sent.
    fn send_chain(
        &mut self,
        memory: &GuestMemory,
        mut chain: Chain,
        room: &mut [u8],
        budget: &mut usize,
    ) -> bool {
        let mut read = chain.readable.skip(self.sent);
        loop {
            let most = room.len().min(*budget);
            if most == 0 {
                return false;
            }
            read = read.and_then(|_| chain.readable.read(memory, &mut room[..most]));
            let count = match &read {
                Ok(0) => return true,
                Ok(count) => *count,
                Err(error) => {
                    self.warn(error);
                    return true;
                }
            };
            let written = self.write_host(&room[..count]);
            *budget -= written;
            self.metrics.tx_bytes.add(written as u64);
            if written < count {
                return false;
            }
        }
    }

    /// Writes to the host side; returns how many bytes it took.
    fn write_host(&mut self, bytes: &[u8]) -> usize {
        let program = match &mut self.host {
            PortPeer::Terminal(terminal) => {
                terminal.show(bytes);
                self.sent += bytes.len();
                return bytes.len();
            }
            PortPeer::Program(Some(program)) => program,
            PortPeer::Program(None) => return 0,
        };
        loop {
            match program.stream.write(bytes) {
                Ok(count) => {
                    self.sent += count;
                    return count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return 0,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // What the program has sent can still be read.
                    self.hang_up();
                    return 0;
                }
            }
        }
    }

    fn disconnect(&mut self) {
        if let PortPeer::Program(program) = &mut self.host {
            *program = None;
            self.discard_rest();
        }
    }

    /// Drops the rest of a chain that a program has got the beginning of: no other program may get it.
    fn discard_rest(&mut self) {
        if self.sent > 0 {
            self.sent = SENT_ALL;
        }
    }

    pub(super) fn save(&self) -> PortState {
        PortState {
            name: self.name.clone(),
            add: self.add,
            introduce: self.introduce,
            ready: self.ready,
            guest_open: self.guest_open,
            host_open: self.host_open,
            cut: self.sent > 0,
        }
    }

    /// Restores saved state, whose name was checked. The host side is not part of it.
    pub(super) fn restore(&mut self, state: &PortState) {
        (self.add, self.introduce, self.ready) = (state.add, state.introduce, state.ready);
        (self.guest_open, self.host_open) = (state.guest_open, state.host_open);
        self.sent = if state.cut { SENT_ALL } else { 0 };
    }

    fn warn(&self, why: impl std::fmt::Display) {
        if let Some(count) = self.warnings.count() {
            tracing::warn!(port = self.name, count, "virtio-console: {why}");
        }
    }
}
