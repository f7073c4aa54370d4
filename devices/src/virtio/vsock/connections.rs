//! All connections of a device by their ports, and which of them sends the next packet.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::backend::{HostEvent, VsockBackend};
use super::connection::{ANSWER_TIME, BUFFER_SIZE, VsockConnection};
use super::greeting::{Greeting, GreetingStatus};
use super::metrics::VsockMetrics;
use super::packet::{HOST_CID, PORT_ANY, PacketOp, PortPair, TYPE_STREAM, VsockHeader};
use crate::log_damper::LogDamper;
use crate::virtio::QueueProgress;

/// Most connections, greetings included. Each may need [`BUFFER_SIZE`] bytes and a descriptor.
pub(super) const MAX_CONNECTIONS: usize = 256;
/// Most refusals that wait for a buffer of the guest's.
pub(super) const MAX_REFUSALS: usize = 256;
/// Programs that are accepted in one turn.
const TURN_ACCEPTS: usize = 64;
/// Ports of programs that connect to the guest: the first of as many. Below are those that the guest connects to.
pub(super) const FIRST_PORT: u32 = 1 << 30;
/// How long a program may take to send its line.
const GREETING_TIME: Duration = Duration::from_secs(8);
/// How often deadlines are checked while there are any.
const TICK: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct VsockConnections {
    pub(super) metrics: Arc<VsockMetrics>,
    backend: Arc<VsockBackend>,
    guest_cid: u64,
    open: HashMap<PortPair, VsockConnection>,
    /// By the host's port.
    greetings: HashMap<u32, Greeting>,
    /// Connections that may have a packet for the guest, each once.
    line: VecDeque<PortPair>,
    /// Answers to packets of no connection.
    refusals: VecDeque<VsockHeader>,
    next_port: u32,
    /// Programs may wait to be accepted.
    accepting: bool,
    /// The timer is set.
    ticking: bool,
    warnings: LogDamper,
}

impl VsockConnections {
    pub(super) fn new(backend: Arc<VsockBackend>, guest_cid: u32) -> Self {
        Self {
            metrics: Arc::default(),
            backend,
            guest_cid: guest_cid.into(),
            open: HashMap::new(),
            greetings: HashMap::new(),
            line: VecDeque::new(),
            refusals: VecDeque::new(),
            next_port: FIRST_PORT,
            accepting: false,
            ticking: false,
            warnings: LogDamper::default(),
        }
    }

    /// The port of the next program that connects. It is saved, as a guest may know the ports before it long after a
    /// move.
    pub(super) fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Sets [`VsockConnections::next_port`]; one past the last port stands for the first.
    pub(super) fn set_next_port(&mut self, port: u32) {
        self.next_port = port;
    }

    /// Drops all connections without a packet to the guest.
    pub(super) fn clear(&mut self) {
        self.open.clear();
        self.greetings.clear();
        self.line.clear();
        self.refusals.clear();
    }

    /// Handles all events on the host.
    pub(super) fn process_host_events(&mut self) -> QueueProgress {
        let now = Instant::now();
        let (events, mut more) = self.backend.poll().unwrap_or_else(|error| {
            self.warn("cannot wait for events", &error);
            (Vec::new(), false)
        });
        for event in events {
            match event {
                HostEvent::Accept => self.accepting = true,
                HostEvent::Time => self.end_all_overdue(now),
                HostEvent::Greeting(host_port) => self.process_greeting(host_port, now),
                HostEvent::Stream(ports, changes) => {
                    if let Some(connection) = self.open.get_mut(&ports) {
                        connection.handle_stream_event(changes);
                        self.line_up(ports);
                    }
                }
            }
        }
        more |= self.accepting && self.accept(now);
        if more {
            QueueProgress::More
        } else {
            QueueProgress::Idle
        }
    }

    /// Handles a packet from the guest with its data.
    pub(super) fn process_packet(&mut self, packet: &VsockHeader, data: &[u8]) {
        if packet.source_cid != self.guest_cid {
            // There is no such sender to answer.
            return self.warn(
                "dropped a packet",
                &format!("it comes from CID {}", packet.source_cid),
            );
        }
        let ports = PortPair {
            host: packet.destination_port,
            guest: packet.source_port,
        };
        if packet.destination_cid != HOST_CID || packet.kind != TYPE_STREAM || ports.guest == PORT_ANY {
            return self.refuse(packet);
        }
        match (packet.op, self.open.get_mut(&ports)) {
            (Some(PacketOp::Reset), Some(_)) => self.remove(ports),
            (_, Some(connection)) => {
                connection.process_packet(packet, data, ports.host);
                self.line_up(ports);
            }
            (Some(PacketOp::Request), None) => self.connect(packet, ports),
            (_, None) => self.refuse(packet),
        }
    }

    /// Whether there is room for one more refusal. If not, no packet may be popped from the guest's queue.
    pub(super) fn can_refuse(&self) -> bool {
        self.refusals.len() < MAX_REFUSALS
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.refusals.is_empty() || !self.line.is_empty()
    }

    /// The next packet for the guest, with its data at the front of `room`. Connections take turns.
    pub(super) fn next(&mut self, room: &mut [u8]) -> Option<VsockHeader> {
        if let Some(refusal) = self.refusals.pop_front() {
            return Some(refusal);
        }
        loop {
            let ports = self.line.pop_front()?;
            let Some(connection) = self.open.get_mut(&ports) else {
                continue;
            };
            connection.in_line = false;
            let Some(packet) = connection.next(room) else {
                continue;
            };
            if packet.op == PacketOp::Reset {
                self.remove(ports);
            } else {
                self.line_up(ports);
            }
            return Some(VsockHeader {
                source_cid: HOST_CID,
                destination_cid: self.guest_cid,
                source_port: ports.host,
                destination_port: ports.guest,
                // At most `room`.
                len: packet.len as u32,
                kind: TYPE_STREAM,
                op: Some(packet.op),
                flags: packet.flags,
                buffer_size: BUFFER_SIZE as u32,
                forwarded: packet.forwarded,
            });
        }
    }

    /// Ends a connection whose packet from [`VsockConnections::next`] could not be written to the guest's buffer: its
    /// stream has a hole.
    pub(super) fn packet_lost(&mut self, packet: &VsockHeader) {
        let ports = PortPair {
            host: packet.source_port,
            guest: packet.destination_port,
        };
        if let Some(connection) = self.open.get_mut(&ports) {
            connection.end();
            self.line_up(ports);
        }
    }

    /// Sets the timer if there are deadlines, or programs that could not be accepted.
    pub(super) fn arm_timer(&mut self) {
        let has_deadlines = || {
            self.open
                .values()
                .any(|connection| connection.deadline().is_some())
        };
        if self.ticking || !(self.accepting || !self.greetings.is_empty() || has_deadlines()) {
            return;
        }
        match self.backend.wake_in(TICK) {
            Ok(()) => self.ticking = true,
            Err(error) => self.warn("cannot set a timer", &error),
        }
    }

    /// Ends greetings and connections whose deadline has passed.
    pub(super) fn end_all_overdue(&mut self, now: Instant) {
        self.ticking = false;
        self.greetings.retain(|_, greeting| greeting.deadline > now);
        let overdue =
            |connection: &VsockConnection| connection.deadline().is_some_and(|deadline| deadline <= now);
        let open = self.open.iter();
        let overdue = open.filter(|(_, connection)| overdue(connection));
        let overdue: Vec<_> = overdue.map(|(ports, _)| *ports).collect();
        overdue.into_iter().for_each(|ports| self.end_overdue(ports));
    }

    /// Ends a connection that the guest has not answered in time.
    fn end_overdue(&mut self, ports: PortPair) {
        let Some(connection) = self.open.get_mut(&ports) else {
            return;
        };
        let is_unanswered = connection.is_unanswered();
        connection.end();
        if is_unanswered {
            self.metrics.unanswered.add(1);
            self.warn(
                "gave up a connection to the guest",
                &format!("port {} did not answer within {ANSWER_TIME:?}", ports.guest),
            );
        }
        self.line_up(ports);
    }

    /// Accepts programs that have connected; returns whether more may wait. A program beyond [`MAX_CONNECTIONS`] is
    /// disconnected.
    fn accept(&mut self, now: Instant) -> bool {
        for _ in 0..TURN_ACCEPTS {
            match self.backend.accept() {
                Ok(Some(stream)) => self.add_greeting(stream, now),
                Ok(None) => {
                    self.accepting = false;
                    return false;
                }
                Err(error) => {
                    // Out of descriptors, for example. The timer tries again.
                    self.warn("cannot accept a connection", &error);
                    return false;
                }
            }
        }
        true
    }

    fn add_greeting(&mut self, stream: UnixStream, now: Instant) {
        if self.is_full() {
            let limit = format!("there are {MAX_CONNECTIONS}");
            return self.warn("refused a connection to the guest", &limit);
        }
        let host_port = self.allocate_port();
        if let Err(error) = self.backend.watch_greeting(&stream, host_port) {
            return self.warn("cannot watch a connection", &error);
        }
        let deadline = now + GREETING_TIME;
        self.greetings.insert(host_port, Greeting { stream, deadline });
    }

    fn process_greeting(&mut self, host_port: u32, now: Instant) {
        let Some(greeting) = self.greetings.get(&host_port) else {
            return;
        };
        let guest_port = match greeting.read_port() {
            GreetingStatus::NotYet => return,
            GreetingStatus::Port(port) => Some(port),
            GreetingStatus::Nonsense => None,
        };
        let (Some(greeting), Some(guest)) = (self.greetings.remove(&host_port), guest_port) else {
            return;
        };
        let ports = PortPair {
            host: host_port,
            guest,
        };
        if self.open.contains_key(&ports) {
            return self.warn(
                "refused a connection to the guest",
                &"the guest has taken its ports",
            );
        }
        match self.backend.watch(&greeting.stream, ports, true) {
            Ok(()) => self.insert(ports, VsockConnection::from_host(greeting.stream, now)),
            Err(error) => self.warn("cannot watch a connection", &error),
        }
    }

    /// Connects the guest to the program that its request names, or refuses.
    fn connect(&mut self, request: &VsockHeader, ports: PortPair) {
        if self.is_full() {
            self.warn(
                "refused a connection of the guest",
                &format!("there are {MAX_CONNECTIONS}"),
            );
            return self.refuse(request);
        }
        let connected = self.backend.connect(ports.host).and_then(|stream| {
            self.backend.watch(&stream, ports, false)?;
            Ok(stream)
        });
        match connected {
            Ok(stream) => self.insert(ports, VsockConnection::from_guest(stream, request)),
            Err(error) => {
                tracing::debug!(port = ports.host, %error, "virtio-vsock: nobody waits for the guest");
                self.refuse(request);
            }
        }
    }

    fn insert(&mut self, ports: PortPair, connection: VsockConnection) {
        self.metrics.connections.add(1);
        self.open.insert(ports, connection);
        self.line_up(ports);
    }

    fn remove(&mut self, ports: PortPair) {
        self.open.remove(&ports);
        self.line.retain(|other| *other != ports);
    }

    fn line_up(&mut self, ports: PortPair) {
        if let Some(connection) = self.open.get_mut(&ports)
            && !connection.in_line
        {
            connection.in_line = true;
            self.line.push_back(ports);
        }
    }

    /// Answers a packet with a reset; a reset is never answered.
    fn refuse(&mut self, packet: &VsockHeader) {
        if packet.op != Some(PacketOp::Reset) {
            self.refusals.push_back(packet.refusal());
        }
    }

    fn is_full(&self) -> bool {
        self.open.len() + self.greetings.len() >= MAX_CONNECTIONS
    }

    /// Allocates a port of the host that no connection uses.
    fn allocate_port(&mut self) -> u32 {
        let taken =
            |port| self.greetings.contains_key(&port) || self.open.keys().any(|ports| ports.host == port);
        let mut port = self.next_port;
        // The loop ends: there are far more ports than connections.
        loop {
            if port == 2 * FIRST_PORT {
                port = FIRST_PORT;
            }
            if !taken(port) {
                break;
            }
            port += 1;
        }
        self.next_port = port + 1;
        port
    }

    fn warn(&self, what: &str, why: &dyn std::fmt::Display) {
        if let Some(count) = self.warnings.count() {
            let socket = self.backend.path().display();
            tracing::warn!(%socket, count, "virtio-vsock: {what}: {why}");
        }
    }
}
