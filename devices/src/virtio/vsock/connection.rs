//! One connection: a socket in the guest and a Unix stream on the host, with what is under way between them.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;

use super::packet::{NO_RECEIVE, NO_SEND, NOTHING_MORE, PacketOp, VsockHeader};

/// Most bytes from the guest that wait for a program on the host: the room that the device announces to the guest.
pub(super) const BUFFER_SIZE: usize = 64 << 10;
/// So much room must have become free before the device sends a credit update unasked.
const CREDIT_UPDATE_MIN: u32 = BUFFER_SIZE as u32 / 2;
/// How long the guest may take to answer a request, or to react when the host's program has closed.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(8);

/// A connection.
#[derive(Debug)]
pub(super) struct VsockConnection {
    stream: UnixStream,
    phase: ConnectionPhase,
    /// When the guest must have answered; `None` if no answer is due.
    deadline: Option<Instant>,
    /// Whether it is in the line of [`super::connections::VsockConnections`] for a buffer of the guest's.
    pub(super) in_line: bool,
    to_guest: FlowToGuest,
    to_host: FlowToHost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ConnectionPhase {
    /// A request must be sent to the guest.
    RequestDue,
    /// The request was sent; the guest has not answered.
    Requested,
    /// The guest has sent a request; the response must be sent.
    ResponseDue,
    /// Data may flow.
    Open,
    /// The connection is over; a reset must be sent to the guest.
    Ended,
}

/// The way from the host's program to the guest.
#[derive(Debug, Default)]
struct FlowToGuest {
    /// The stream may have something to read: data, its end, an error.
    readable: bool,
    /// Bytes sent in total; wraps.
    sent: u32,
    /// The guest's room, as it was reported last.
    room: u32,
    /// Bytes that have left the guest's room in total, as it was reported last; wraps.
    forwarded: u32,
    /// A credit request was sent since the guest last reported its room.
    asked: bool,
    /// What the host's program will not do any more (shutdown flags).
    shutdown: u32,
    /// The shutdown flags that were reported to the guest.
    reported: u32,
}

/// The way from the guest to the host's program.
#[derive(Debug, Default)]
struct FlowToHost {
    /// Data that the stream did not take yet, at most [`BUFFER_SIZE`].
    waiting: VecDeque<u8>,
    /// Bytes that the stream took in total; wraps.
    forwarded: u32,
    /// What of `forwarded` was reported to the guest.
    reported: u32,
    /// The guest has sent a credit request.
    owes_credit: bool,
    /// What the guest will not do any more (shutdown flags).
    shutdown: u32,
    /// The stream's sending side was shut down.
    ended: bool,
}

/// A packet for the guest without its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) op: PacketOp,
    pub(super) flags: u32,
    /// Bytes of data.
    pub(super) len: usize,
    /// As in [`VsockHeader::forwarded`].
    pub(super) forwarded: u32,
}

impl VsockConnection {
    /// A connection that a program on the host asks for.
    pub(super) fn from_host(stream: UnixStream, now: Instant) -> Self {
        let deadline = Some(now + ANSWER_TIME);
        Self::new(stream, ConnectionPhase::RequestDue, deadline)
    }

    /// A connection that the guest asks for by `request`, to a program on the host that has accepted it.
    pub(super) fn from_guest(stream: UnixStream, request: &VsockHeader) -> Self {
        let mut connection = Self::new(stream, ConnectionPhase::ResponseDue, None);
        connection.to_guest.update_credit(request);
        connection
    }

    fn new(stream: UnixStream, phase: ConnectionPhase, deadline: Option<Instant>) -> Self {
        Self {
            stream,
            phase,
            deadline,
            in_line: false,
            to_guest: FlowToGuest::default(),
            to_host: FlowToHost::default(),
        }
    }

    /// Whether a program on the host waits for the guest to accept the connection.
    pub(super) fn is_unanswered(&self) -> bool {
        matches!(
            self.phase,
            ConnectionPhase::RequestDue | ConnectionPhase::Requested
        )
    }

    /// When the guest must have answered.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Ends the connection; the next packet for the guest is a reset.
    pub(super) fn end(&mut self) {
        self.phase = ConnectionPhase::Ended;
    }

    /// Handles a packet from the guest with its data. A packet that does not fit the phase ends the connection.
    pub(super) fn process_packet(&mut self, packet: &VsockHeader, data: &[u8], host_port: u32) {
        self.to_guest.update_credit(packet);
        let sensible = match (packet.op, self.phase) {
            (Some(PacketOp::Response), ConnectionPhase::Requested) => self.accepted(host_port),
            (Some(PacketOp::Data), ConnectionPhase::Open) => self.buffer_data(data),
            (Some(PacketOp::Shutdown), ConnectionPhase::Open) => {
                self.shut_down(packet.flags);
                true
            }
            (Some(PacketOp::CreditUpdate), ConnectionPhase::Open) => true,
            (Some(PacketOp::CreditRequest), ConnectionPhase::Open) => {
                self.to_host.owes_credit = true;
                true
            }
            _ => false,
        };
        if !sensible {
            self.end();
        }
    }

    /// Handles an epoll event of the stream.
    pub(super) fn handle_stream_event(&mut self, events: EventFlags) {
        if events.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            self.to_guest.readable = true;
        }
        if events.contains(EventFlags::HUP) {
            self.program_closed();
        }
        self.write_buffered();
    }

    /// The next packet for the guest, with data at the front of `room`; `None` if there is none for now. A
    /// [`PacketOp::Reset`] is the last.
    pub(super) fn next(&mut self, room: &mut [u8]) -> Option<Outgoing> {
        let (op, flags, len) = match self.phase {
            ConnectionPhase::RequestDue => {
                self.phase = ConnectionPhase::Requested;
                (PacketOp::Request, 0, 0)
            }
            ConnectionPhase::Requested => return None,
            ConnectionPhase::ResponseDue => {
                self.phase = ConnectionPhase::Open;
                (PacketOp::Response, 0, 0)
            }
            ConnectionPhase::Open => self.next_when_open(room)?,
            ConnectionPhase::Ended => (PacketOp::Reset, 0, 0),
        };
        self.to_host.reported = self.to_host.forwarded;
        Some(Outgoing {
            op,
            flags,
            len,
            forwarded: self.to_host.reported,
        })
    }

    fn next_when_open(&mut self, room: &mut [u8]) -> Option<(PacketOp, u32, usize)> {
        if self.to_host.shutdown == NOTHING_MORE && self.to_host.waiting.is_empty() {
            self.end();
            return Some((PacketOp::Reset, 0, 0));
        }
        match self.read(room) {
            Ok(0) => {}
            Ok(len) => return Some((PacketOp::Data, 0, len)),
            Err(_) => {
                self.end();
                return Some((PacketOp::Reset, 0, 0));
            }
        }
        let FlowToGuest {
            shutdown, reported, ..
        } = self.to_guest;
        if shutdown != reported {
            self.to_guest.reported = shutdown;
            if shutdown == NOTHING_MORE {
                self.deadline = Some(Instant::now() + ANSWER_TIME);
            }
            return Some((PacketOp::Shutdown, shutdown, 0));
        }
        let unreported = self.to_host.forwarded.wrapping_sub(self.to_host.reported);
        if self.to_host.owes_credit || unreported >= CREDIT_UPDATE_MIN {
            self.to_host.owes_credit = false;
            return Some((PacketOp::CreditUpdate, 0, 0));
        }
        if self.wants_to_read() && self.to_guest.credit() == 0 && !self.to_guest.asked {
            self.to_guest.asked = true;
            return Some((PacketOp::CreditRequest, 0, 0));
        }
        None
    }

    fn wants_to_read(&self) -> bool {
        self.to_guest.readable
            && self.to_guest.shutdown & NO_SEND == 0
            && self.to_host.shutdown & NO_RECEIVE == 0
    }

    /// Reads as much from the stream as the guest has room for; 0 if there is nothing to read, or no room.
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let most = room.len().min(self.to_guest.credit() as usize);
        if !self.wants_to_read() || most == 0 {
            return Ok(0);
        }
        match retry_interrupted(|| self.stream.read(&mut room[..most])) {
            Ok(0) => {
                self.to_guest.shutdown |= NO_SEND;
                Ok(0)
            }
            Ok(len) => {
                // At most `most`, which came from a u32.
                self.to_guest.sent = self.to_guest.sent.wrapping_add(len as u32);
                Ok(len)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.to_guest.readable = false;
                Ok(0)
            }
            Err(error) => Err(error),
        }
    }

    /// Handles the guest's response. Returns whether the line for the host's program could be written.
    fn accepted(&mut self, host_port: u32) -> bool {
        self.phase = ConnectionPhase::Open;
        self.deadline = None;
        let line = format!("OK {host_port}\n");
        // These are the first bytes on the stream, so there is room for them unless the program has closed.
        retry_interrupted(|| self.stream.write(line.as_bytes())).is_ok_and(|written| written == line.len())
    }

    /// Buffers data from the guest and writes what the stream takes. Returns whether the guest had credit to send it.
    fn buffer_data(&mut self, data: &[u8]) -> bool {
        let to_host = &mut self.to_host;
        if to_host.shutdown & NO_SEND != 0 || data.len() > BUFFER_SIZE - to_host.waiting.len() {
            return false;
        }
        to_host.waiting.extend(data);
        self.write_buffered();
        true
    }

    fn shut_down(&mut self, flags: u32) {
        self.to_host.shutdown |= flags & NOTHING_MORE;
        if flags & NO_RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.write_buffered();
    }

    /// Writes buffered data as far as the stream takes it, and shuts the stream down once the guest's last byte is
    /// written.
    fn write_buffered(&mut self) {
        while !self.to_host.waiting.is_empty() {
            let (front, _) = self.to_host.waiting.as_slices();
            match retry_interrupted(|| self.stream.write(front)) {
                Ok(written) => self.to_host.consume(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.program_closed(),
            }
        }
        if self.to_host.shutdown & NO_SEND != 0 && !self.to_host.ended {
            // Once only: each shutdown raises an event of the stream, after which this would run again, for ever.
            self.to_host.ended = true;
            // Fails if the program has closed, which an event reports anyway.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// The host's program has closed: what the guest sends is dropped from now on.
    fn program_closed(&mut self) {
        if self.phase == ConnectionPhase::Requested {
            self.end();
        }
        self.to_guest.shutdown |= NO_RECEIVE;
        self.to_host.consume(self.to_host.waiting.len());
    }
}

impl FlowToGuest {
    /// Takes over the guest's credit, which every packet carries.
    fn update_credit(&mut self, packet: &VsockHeader) {
        self.room = packet.buffer_size;
        self.forwarded = packet.forwarded;
        // Not if the guest has no room: it answers each credit request, and would be asked again for ever.
        self.asked &= self.credit() == 0;
    }

    /// Bytes that the guest has room for (virtio 1.2, 5.10.6.3).
    fn credit(&self) -> u32 {
        self.room.saturating_sub(self.sent.wrapping_sub(self.forwarded))
    }
}

impl FlowToHost {
    /// Drops the first bytes of the buffer and counts them as forwarded.
    fn consume(&mut self, count: usize) {
        self.waiting.drain(..count);
        // At most `BUFFER_SIZE`.
        self.forwarded = self.forwarded.wrapping_add(count as u32);
    }
}

fn retry_interrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}
