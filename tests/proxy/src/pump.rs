//! One direction of one connection.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::fault::{Direction, NetworkPace, ProxyConnection, ProxyFault, When};
use crate::frame::{HEADER, ProxyFrame, content_len, data_len};
use crate::proxy::ProxyShared;
use crate::socket::{Bell, Gone, ProxySocket};

/// A connection from the source, and the one that goes on to the destination. Closed when both of its pumps have
/// ended.
#[derive(Debug)]
pub(crate) struct Pair {
    source: ProxySocket,
    destination: ProxySocket,
    bell: Bell,
    connection: Mutex<ProxyConnection>,
}

impl Pair {
    pub(crate) fn new(
        source: ProxySocket,
        destination: ProxySocket,
        bell: Bell,
        connection: ProxyConnection,
    ) -> Self {
        Self {
            source,
            destination,
            bell,
            connection: Mutex::new(connection),
        }
    }

    /// Resets both connections, so that both peers get an error.
    pub(crate) fn reset(&self) {
        self.source.reset_on_close();
        self.destination.reset_on_close();
        self.bell.ring();
    }

    /// What the connection is for, after a message that may say so.
    fn connection(&self, frame: &ProxyFrame) -> ProxyConnection {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(purpose) = frame.purpose() {
            *connection = purpose;
        }
        *connection
    }
}

/// Passes frames on, one way.
pub(crate) struct Pump {
    shared: Arc<ProxyShared>,
    pair: Arc<Pair>,
    direction: Direction,
}

/// What was received.
enum ReceivedFrame {
    Frame(ProxyFrame),
    /// Bytes that are no frame, or not all of one before the end.
    Other(ProxyFrame),
    End,
}

/// On a slow network a piece passes every so often.
const BEAT: Duration = Duration::from_millis(5);
const BEATS_PER_SECOND: u64 = 200;

/// Raw bytes pass in pieces of this size.
const PIECE: usize = 64 << 10;

impl Pump {
    pub(crate) fn new(shared: Arc<ProxyShared>, pair: Arc<Pair>, direction: Direction) -> Self {
        Self {
            shared,
            pair,
            direction,
        }
    }

    /// Passes frames on until the end of the connection, or of its direction.
    pub(crate) fn run(self) {
        match self.pass_all() {
            Ok(()) => self.to().end(),
            Err(Gone::Woken) => {}
            Err(Gone::Lost) => self.pair.reset(),
        }
    }

    fn pass_all(&self) -> Result<(), Gone> {
        // A reset does not wait for a pause in the data.
        while self.pair.bell.rest(Some(Duration::ZERO)) {
            match self.receive()? {
                ReceivedFrame::Frame(frame) => self.pass(frame)?,
                ReceivedFrame::Other(rest) => return self.pass_raw(&rest),
                ReceivedFrame::End => return Ok(()),
            }
        }
        Err(Gone::Woken)
    }

    /// Passes one frame on, or what a fault makes of it.
    fn pass(&self, mut frame: ProxyFrame) -> Result<(), Gone> {
        let connection = self.pair.connection(&frame);
        self.shared.expect_streams(&frame);
        let fault = self.shared.note(connection, self.direction, frame.name());
        match fault {
            None => self.send(&frame),
            Some(ProxyFault::Drop) => Ok(()),
            Some(ProxyFault::Delay(time)) => self.rest_and_send(Some(time), &frame),
            Some(ProxyFault::Stall(time)) => self.rest_and_send(time, &frame),
            Some(ProxyFault::Truncate) => {
                frame.bytes.truncate(frame.bytes.len() / 2);
                self.send(&frame)?;
                self.to().end();
                self.pair.bell.ring();
                Err(Gone::Woken)
            }
            Some(ProxyFault::Corrupt(part)) => {
                frame.corrupt(part);
                self.send(&frame)
            }
            Some(ProxyFault::Duplicate) => {
                self.send(&frame)?;
                self.send(&frame)
            }
            Some(ProxyFault::Reset) => {
                self.pair.reset();
                Err(Gone::Woken)
            }
            Some(ProxyFault::CutAll) => {
                self.shared.cut_all();
                Err(Gone::Woken)
            }
            Some(ProxyFault::Pace(pace)) => {
                self.shared.set_pace(pace);
                self.send(&frame)
            }
            Some(ProxyFault::Call(When::Before, call)) => {
                call();
                self.send(&frame)
            }
            Some(ProxyFault::Call(When::After, call)) => {
                let sent = self.send(&frame);
                call();
                sent
            }
        }
    }

    /// Passes what is no frame on as it is, and all that follows.
    fn pass_raw(&self, rest: &ProxyFrame) -> Result<(), Gone> {
        let connection = self.pair.connection(rest);
        // Recorded only: faults strike messages.
        let _ = self.shared.note(connection, self.direction, "garbage".into());
        self.send(rest)?;
        let mut piece = vec![0; PIECE];
        loop {
            let mut files = Vec::new();
            let got = self.from().receive(&mut piece, &mut files, &self.pair.bell)?;
            if got == 0 {
                return Ok(());
            }
            self.to().send(&piece[..got], &files, &self.pair.bell)?;
        }
    }

    /// A frame with what follows it.
    fn receive(&self) -> Result<ReceivedFrame, Gone> {
        let mut frame = ProxyFrame {
            bytes: Vec::new(),
            data_at: HEADER,
            files: Vec::new(),
        };
        if !self.fill(&mut frame, HEADER)? {
            return Ok(if frame.bytes.is_empty() {
                ReceivedFrame::End
            } else {
                ReceivedFrame::Other(frame)
            });
        }
        let header = frame.bytes.first_chunk().copied();
        let Some(content) = header.and_then(content_len) else {
            return Ok(ReceivedFrame::Other(frame));
        };
        if !self.fill(&mut frame, content)? {
            return Ok(ReceivedFrame::Other(frame));
        }
        frame.data_at = frame.bytes.len();
        let Some(data) = data_len(&frame.bytes) else {
            return Ok(ReceivedFrame::Other(frame));
        };
        if !self.fill(&mut frame, data)? {
            return Ok(ReceivedFrame::Other(frame));
        }
        Ok(ReceivedFrame::Frame(frame))
    }

    /// Adds so many bytes to the frame. Answers whether they came before the end.
    fn fill(&self, frame: &mut ProxyFrame, count: usize) -> Result<bool, Gone> {
        let mut at = frame.bytes.len();
        frame.bytes.resize(at + count, 0);
        while at < frame.bytes.len() {
            let got = self
                .from()
                .receive(&mut frame.bytes[at..], &mut frame.files, &self.pair.bell)?;
            at += got;
            if got == 0 {
                frame.bytes.truncate(at);
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn rest_and_send(&self, time: Option<Duration>, frame: &ProxyFrame) -> Result<(), Gone> {
        if self.pair.bell.rest(time) {
            self.send(frame)
        } else {
            Err(Gone::Woken)
        }
    }

    fn send(&self, frame: &ProxyFrame) -> Result<(), Gone> {
        let (mut bytes, mut files) = (&frame.bytes[..], &frame.files[..]);
        while !bytes.is_empty() {
            let most = match self.shared.pace() {
                NetworkPace::Free => bytes.len(),
                NetworkPace::Bytes(per_second) => {
                    if !self.pair.bell.rest(Some(BEAT)) {
                        return Err(Gone::Woken);
                    }
                    per_second.div_ceil(BEATS_PER_SECOND) as usize
                }
            };
            let (piece, rest) = bytes.split_at(most.min(bytes.len()));
            self.to().send(piece, files, &self.pair.bell)?;
            bytes = rest;
            if !piece.is_empty() {
                files = &[];
            }
        }
        Ok(())
    }

    fn from(&self) -> &ProxySocket {
        match self.direction {
            Direction::ToDestination => &self.pair.source,
            Direction::ToSource => &self.pair.destination,
        }
    }

    fn to(&self) -> &ProxySocket {
        match self.direction {
            Direction::ToDestination => &self.pair.destination,
            Direction::ToSource => &self.pair.source,
        }
    }
}
