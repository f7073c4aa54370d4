//! The device: its ports, and the control messages about them.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use migration_state::Envelope;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::backend::ConsoleBackend;
use super::control::{DeviceMessage, DriverMessage, MESSAGE_LEN};
use super::metrics::ConsoleMetrics;
use super::parameters::{ConsoleParameters, PORTS_MAX};
use super::port::{ConsolePort, PortPeer};
use super::state::ConsoleState;
use super::terminal::{ConsoleTerminal, TerminalSize};
use crate::log_damper::LogDamper;
use crate::metrics::Counters;
use crate::virtio::device::{RING_FEATURES, read_bytes};
use crate::virtio::{Description, DeviceError, HostBackend, QueueError, QueueProgress, Queues, VirtioDevice};

/// The configuration space has the terminal's size (virtio 1.2, 5.3.3).
const F_SIZE: u64 = 1 << 0;
/// There are more ports than one, and control queues.
const F_MULTIPORT: u64 = 1 << 1;
/// A byte can be printed without a queue.
const F_EMERG_WRITE: u64 = 1 << 2;

/// Offset of that byte in the configuration space.
const EMERG_WR: u64 = 8;
/// The queue of control messages to the guest (virtio 1.2, 5.3.2).
const CONTROL_TO_GUEST: usize = 2;
/// The queue of control messages from the guest.
const CONTROL_FROM_GUEST: usize = 3;
/// Size of a queue: Linux fills it with a page a buffer.
const QUEUE_SIZE: u16 = 64;
/// The sizes of all queues that a device can have.
const QUEUE_SIZES: [u16; 2 + 2 + 2 * PORTS_MAX] = [QUEUE_SIZE; 4 + 2 * PORTS_MAX];
/// Control messages in one turn, each way.
const TURN_MESSAGES: usize = 64;
/// Bytes that are moved at a time.
const ROOM: usize = 16 << 10;

/// A console device.
#[derive(Debug)]
pub struct VirtioConsole {
    terminal: Arc<ConsoleTerminal>,
    backend: Arc<ConsoleBackend>,
    has_terminal: bool,
    /// The first is the console.
    ports: Vec<ConsolePort>,
    /// The driver has negotiated VIRTIO_CONSOLE_F_MULTIPORT.
    multiport: bool,
    /// The terminal's size as the guest knows it.
    size: Option<TerminalSize>,
    room: Box<[u8]>,
    metrics: Arc<ConsoleMetrics>,
    warnings: LogDamper,
}

impl VirtioConsole {
    /// A device whose console is `terminal`, with the ports of `backend`. `has_terminal` says whether input from the
    /// machine's terminal goes to it.
    pub fn new(terminal: Arc<ConsoleTerminal>, backend: Arc<ConsoleBackend>, has_terminal: bool) -> Self {
        let metrics = Arc::new(ConsoleMetrics::default());
        let port = |name, host| ConsolePort::new(name, host, metrics.clone());
        let console = port(String::new(), PortPeer::Terminal(terminal.clone()));
        let named = backend.names().iter();
        let named = named.map(|name| port(name.clone(), PortPeer::Program(None)));
        Self {
            ports: std::iter::once(console).chain(named).collect(),
            terminal,
            backend,
            has_terminal,
            multiport: false,
            size: None,
            room: vec![0; ROOM].into(),
            metrics,
            warnings: LogDamper::default(),
        }
    }

    /// Serves the queues of `ports`, and sends control messages.
    fn process_ports(
        &mut self,
        queues: &mut Queues<'_>,
        ports: Range<usize>,
    ) -> Result<QueueProgress, QueueError> {
        let mut progress = QueueProgress::Idle;
        for index in ports {
            self.accept_program(index);
            if let Some(port) = self.ports.get_mut(index) {
                let (to_guest, from_guest) = queues_of_port(index);
                if let Some(mut queue) = queues.get(to_guest) {
                    progress = progress.and(port.process_receive_queue(&mut queue, &mut self.room)?);
                }
                if let Some(mut queue) = queues.get(from_guest) {
                    progress = progress.and(port.process_transmit_queue(&mut queue, &mut self.room)?);
                }
            }
        }
        Ok(progress.and(self.send_control_messages(queues)?))
    }

    /// Accepts the next program that has connected to a port, if the port is free.
    fn accept_program(&mut self, index: usize) {
        let (true, Some(port), Some(socket)) =
            (self.multiport, self.ports.get_mut(index), index.checked_sub(1))
        else {
            return;
        };
        port.release_closed_program();
        if port.can_accept_program() {
            match self.backend.accept(socket) {
                Ok(Some(stream)) => port.connect(stream),
                Ok(None) => {}
                Err(error) => self.warn(format_args!("cannot take a program that has connected: {error}")),
            }
        }
    }

    /// Handles the driver's control messages.
    fn process_control_queue(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        let Some(mut queue) = queues.get(CONTROL_FROM_GUEST).filter(|_| self.multiport) else {
            return Ok(QueueProgress::Idle);
        };
        let mut received = 0;
        let progress = loop {
            if received == TURN_MESSAGES {
                break QueueProgress::More;
            }
            let Some((head, chain)) = queue.pop()? else {
                break QueueProgress::Idle;
            };
            let mut message = [0; MESSAGE_LEN];
            match chain.map(|mut chain| chain.readable.read(queue.memory(), &mut message)) {
                Ok(Ok(MESSAGE_LEN)) => self.handle_control_message(&message),
                Ok(Ok(got)) => self.warn(format_args!("a control message of {got} bytes")),
                Ok(Err(error)) => self.warn(error),
                Err(error) => self.warn(error),
            }
            queue.add_used(head, 0)?;
            received += 1;
        };
        if received > 0 {
            queue.notify()?;
        }
        Ok(progress)
    }

    fn handle_control_message(&mut self, message: &[u8; MESSAGE_LEN]) {
        let Some(decoded) = DriverMessage::decode(message) else {
            return self.warn(format_args!("control message {message:02x?} makes no sense"));
        };
        let (id, is_ready) = match decoded {
            DriverMessage::Device(true) => return self.ports.iter_mut().for_each(ConsolePort::announce),
            DriverMessage::Device(false) => return self.warn("the guest cannot use its ports"),
            DriverMessage::Ready(id, ready) => (id, Some(ready)),
            DriverMessage::Open(id, _) => (id, None),
        };
        let Some(port) = usize::try_from(id).ok().and_then(|id| self.ports.get_mut(id)) else {
            return self.warn(format_args!("control message of port {id}, which there is not"));
        };
        match decoded {
            DriverMessage::Open(_, open) => port.guest_open = open,
            _ => port.set_ready(is_ready == Some(true)),
        }
        if id == 0 && is_ready.is_some() {
            self.size = None;
        }
    }

    /// Sends the control messages that are due, or reports a new size in the configuration space.
    fn send_control_messages(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        if !self.multiport {
            if let Some(size) = self.unsent_size() {
                self.size = Some(size);
                queues.config_changed();
            }
            return Ok(QueueProgress::Idle);
        }
        let Some(mut queue) = queues.get(CONTROL_TO_GUEST) else {
            return Ok(QueueProgress::Idle);
        };
        let mut sent = 0;
        let progress = loop {
            let Some((index, message)) = self.next_control_message() else {
                break QueueProgress::Idle;
            };
            if sent == TURN_MESSAGES {
                break QueueProgress::More;
            }
            let Some((head, chain)) = queue.pop()? else {
                break QueueProgress::Idle;
            };
            // There are few ports.
            let bytes = message.encode(index as u32);
            let filled = chain.is_ok_and(|mut chain| {
                let filled = chain.writable.fill(queue.memory(), &bytes);
                filled.is_ok_and(|count| count == bytes.len())
            });
            if filled {
                self.control_message_sent(index, &message);
            } else {
                self.warn("no room for a control message in a buffer for one");
            }
            queue.add_used(head, if filled { bytes.len() as u32 } else { 0 })?;
            sent += 1;
        };
        if sent > 0 {
            queue.notify()?;
        }
        Ok(progress)
    }

    /// The next control message for the guest, and its port.
    fn next_control_message(&self) -> Option<(usize, DeviceMessage)> {
        let of_ports = self.ports.iter().enumerate();
        let next = of_ports
            .filter_map(|(index, port)| Some((index, port.next_control_message()?)))
            .next();
        next.or_else(|| {
            self.ports.first().filter(|console| console.ready)?;
            Some((0, DeviceMessage::Resize(self.unsent_size()?)))
        })
    }

    fn control_message_sent(&mut self, index: usize, message: &DeviceMessage) {
        if let DeviceMessage::Resize(size) = message {
            self.size = Some(*size);
        }
        if let Some(port) = self.ports.get_mut(index) {
            port.control_message_sent(message);
        }
        // The next program may have waited for the guest to know that the last one has gone.
        self.accept_program(index);
    }

    /// The terminal's size, if the guest does not know it.
    fn unsent_size(&self) -> Option<TerminalSize> {
        self.terminal.size().filter(|size| self.size != Some(*size))
    }

    fn warn(&self, why: impl std::fmt::Display) {
        if let Some(count) = self.warnings.count() {
            tracing::warn!(count, "virtio-console: {why}");
        }
    }
}

/// The queues of a port (virtio 1.2, 5.3.2): for the guest, and from it. The control queues come after the first
/// port's.
fn queues_of_port(port: usize) -> (usize, usize) {
    let first = if port == 0 { 0 } else { 2 + 2 * port };
    (first, first + 1)
}

/// The port that a queue belongs to; `None` for the control queues.
fn port_of_queue(queue: usize) -> Option<usize> {
    match queue {
        0 | 1 => Some(0),
        CONTROL_TO_GUEST | CONTROL_FROM_GUEST => None,
        _ => Some(queue / 2 - 1),
    }
}

impl VirtioDevice for VirtioConsole {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        let ports = if self.ports.len() > 1 { F_MULTIPORT } else { 0 };
        RING_FEATURES | F_SIZE | F_EMERG_WRITE | ports
    }

    fn queue_sizes(&self) -> &[u16] {
        let named = self.ports.len() - 1;
        &QUEUE_SIZES[..if named == 0 { 2 } else { 4 + 2 * named }]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let TerminalSize { columns, rows } = self.terminal.size().or(self.size).unwrap_or_default();
        let [a, b] = columns.to_le_bytes();
        let [c, d] = rows.to_le_bytes();
        // At most 1 + PORTS_MAX.
        let ports = self.ports.len() as u32;
        let config = [[a, b, c, d], ports.to_le_bytes(), [0; 4]];
        read_bytes(config.as_flattened(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        match data {
            [byte, ..] if offset == EMERG_WR => self.terminal.show(&[*byte]),
            _ => tracing::debug!(
                offset,
                len = data.len(),
                "virtio-console: nothing else in the configuration is writable"
            ),
        }
    }

    fn activate(&mut self, features: u64) {
        self.multiport = features & F_MULTIPORT != 0;
        if !self.multiport
            && let Some(console) = self.ports.first_mut()
        {
            console.guest_open = true;
        }
    }

    fn process_queue(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        match port_of_queue(index) {
            Some(port) => self.process_ports(queues, port..port + 1),
            None => {
                let received = self.process_control_queue(queues)?;
                Ok(received.and(self.process_ports(queues, 0..self.ports.len())?))
            }
        }
    }

    fn host_events(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.terminal.event(), self.backend.events()]
    }

    fn process_host(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        self.terminal.clear_event();
        match self.backend.poll() {
            Ok(gone) => {
                for index in gone {
                    if let Some(port) = self.ports.get_mut(index + 1) {
                        port.hang_up();
                    }
                }
            }
            Err(error) => self.warn(format_args!("cannot see what happens on the host: {error}")),
        }
        self.process_ports(queues, 0..self.ports.len())
    }

    fn reset(&mut self) -> bool {
        self.ports.iter_mut().for_each(ConsolePort::reset);
        self.multiport = false;
        self.size = None;
        true
    }

    /// Nothing to finish: what the guest has sent was written to the host side, or is in the guest's queue.
    fn drain(&mut self, _: &mut Queues<'_>, _: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let state = ConsoleState {
            ports: self.ports.iter().map(ConsolePort::save).collect(),
            size: self.size,
            input: self.terminal.input(),
        };
        Ok(envelope.put(instance, &state)?)
    }

    fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let state: ConsoleState = envelope.take(instance)?;
        state.check(self.ports.iter().map(|port| port.name.as_str()))?;
        for (port, state) in self.ports.iter_mut().zip(&state.ports) {
            port.restore(state);
        }
        self.size = state.size;
        self.terminal.set_input(state.input);
        Ok(())
    }

    fn describe(&self) -> Description {
        let parameters = ConsoleParameters {
            has_terminal: self.has_terminal,
            ports: self.backend.names().to_vec(),
        };
        Description {
            parameters: parameters.to_bytes(),
            ..Description::of::<ConsoleState>(self.features())
        }
    }

    fn metrics(&self) -> Arc<dyn Counters> {
        self.metrics.clone()
    }

    fn host_backend(&self) -> Option<Arc<dyn HostBackend>> {
        Some(self.backend.clone())
    }
}
