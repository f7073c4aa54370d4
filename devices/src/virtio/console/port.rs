//! One port: what is behind it on the host, and how far its bytes have got.

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

/// What one turn does for a port, each way, at most: chains and bytes.
const PORT_TURN_CHAINS: usize = 64;
const PORT_TURN_BYTES: usize = 256 << 10;
/// Of a chain that nobody wants any more.
const SENT_ALL: usize = usize::MAX;

/// A port.
#[derive(Debug)]
pub(super) struct ConsolePort {
    pub(super) name: String,
    pub(super) host: PortPeer,
    /// The guest is to be told that the port is there.
    pub(super) add: bool,
    /// The guest is to be told what it is.
    pub(super) introduce: bool,
    /// The guest has made something of it.
    pub(super) ready: bool,
    /// A program in the guest has it open.
    pub(super) guest_open: bool,
    /// Whether the guest knows that somebody on the host has it open.
    pub(super) host_open: bool,
    /// Bytes of the guest's next chain that the host has, or [`SENT_ALL`].
    sent: usize,
    metrics: Arc<ConsoleMetrics>,
    warnings: LogDamper,
}

/// What is behind a port.
#[derive(Debug)]
pub(super) enum PortPeer {
    /// The machine's terminal, which is always there.
    Terminal(Arc<ConsoleTerminal>),
    /// A program that has connected, if one has.
    Program(Option<Program>),
}

#[derive(Debug)]
pub(super) struct Program {
    stream: UnixStream,
    /// It has closed its end: there may be something left to read.
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

    /// Whether somebody on the host has it open.
    pub(super) fn has_host(&self) -> bool {
        !matches!(self.host, PortPeer::Program(None))
    }

    /// Whether the next program may have it: the guest has heard of the last one's end.
    pub(super) fn can_accept_program(&self) -> bool {
        !self.has_host() && !self.host_open
    }

    /// A program has connected.
    pub(super) fn connect(&mut self, stream: UnixStream) {
        self.metrics.connections.add(1);
        self.host = PortPeer::Program(Some(Program { stream, gone: false }));
    }

    /// The program on the host has closed its end. What it has sent is for the guest, if anybody is there to hear it.
    pub(super) fn hang_up(&mut self) {
        if let PortPeer::Program(Some(program)) = &mut self.host {
            program.gone = true;
        }
        self.discard_rest();
    }

    /// Lets go of a program that has gone and that nobody in the guest listens to.
    pub(super) fn release_closed_program(&mut self) {
        if let PortPeer::Program(Some(Program { gone: true, .. })) = self.host
            && !self.guest_open
        {
            self.disconnect();
        }
    }

    /// The driver starts anew. A program stays connected, but for one that has half of something.
    pub(super) fn reset(&mut self) {
        if self.sent > 0 {
            self.disconnect();
        }
        (self.add, self.introduce, self.ready) = (false, false, false);
        (self.guest_open, self.host_open) = (false, false);
        self.sent = 0;
    }

    /// The driver asks for all ports.
    pub(super) fn announce(&mut self) {
        self.add = true;
        self.set_ready(false);
    }

    /// The guest has made something of the port, or could not.
    pub(super) fn set_ready(&mut self, ready: bool) {
        (self.ready, self.introduce) = (ready, ready);
        (self.guest_open, self.host_open) = (false, false);
    }

    /// What the guest is to be told next.
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

    /// The guest was told.
    pub(super) fn control_message_sent(&mut self, message: &DeviceMessage) {
        match message {
            DeviceMessage::Add => self.add = false,
            DeviceMessage::Console | DeviceMessage::Name(_) => self.introduce = false,
            DeviceMessage::Open(open) => self.host_open = *open,
            DeviceMessage::Resize(_) => {}
        }
    }

    /// Fills chains of the guest's with what the host has; `room` is for bytes on their way.
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
            // No more than `room` has, which fits.
            queue.add_used(head, written as u32)?;
            chains += 1;
            bytes += written;
        };
        if chains > 0 {
            queue.notify()?;
        }
        Ok(progress)
    }

    /// Bytes that were put into the chain; `None` if the host has nothing.
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
                // They are lost: a driver that gives such a buffer has no use for them.
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

    /// Takes what the guest has for the host, as far as somebody there takes it.
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
                // Its socket is full, or it is gone.
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

    /// Whether that was all of the chain.
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

    /// How much of it the host has taken.
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
                    // What it has sent is there to read still.
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

    /// The rest of what a program has the beginning of is for nobody else.
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

    /// Takes saved state, with its name checked. What is on the host is not part of it.
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
