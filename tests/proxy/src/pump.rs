//! One direction of one connection.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::fault::{Connection, Direction, Fault, Pace, When};
use crate::frame::{Frame, HEADER, content_len, data_len};
use crate::proxy::Shared;
use crate::socket::{Bell, Gone, Socket};

/// A connection from the source, and the one that goes on to the destination. Closed when both of its pumps have
/// ended.
#[derive(Debug)]
pub(crate) struct Pair {
    source: Socket,
    destination: Socket,
    bell: Bell,
    connection: Mutex<Connection>,
}

impl Pair {
    pub(crate) fn new(source: Socket, destination: Socket, bell: Bell, connection: Connection) -> Self {
        Self {
            source,
            destination,
            bell,
            connection: Mutex::new(connection),
        }
    }

    /// Ends it, so that both peers notice.
    pub(crate) fn reset(&self) {
        self.source.reset_on_close();
        self.destination.reset_on_close();
        self.bell.ring();
    }

    /// What it is for, after a message that may have told.
    fn connection(&self, frame: &Frame) -> Connection {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(told) = frame.tells() {
            *connection = told;
        }
        *connection
    }
}

/// Passes frames on, one way.
pub(crate) struct Pump {
    shared: Arc<Shared>,
    pair: Arc<Pair>,
    direction: Direction,
}

/// What was received.
enum Received {
    Frame(Frame),
    /// Bytes that are no frame, or not all of one before the end.
    Other(Frame),
    End,
}

/// On a slow network a piece passes every so often.
const BEAT: Duration = Duration::from_millis(5);
const BEATS_PER_SECOND: u64 = 200;

/// Raw bytes pass in pieces of this size.
const PIECE: usize = 64 << 10;

impl Pump {
    pub(crate) fn new(shared: Arc<Shared>, pair: Arc<Pair>, direction: Direction) -> Self {
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
                Received::Frame(frame) => self.pass(frame)?,
                Received::Other(rest) => return self.pass_raw(&rest),
                Received::End => return Ok(()),
            }
        }
        Err(Gone::Woken)
    }

    /// Passes one frame on, or what a fault makes of it.
    fn pass(&self, mut frame: Frame) -> Result<(), Gone> {
        let connection = self.pair.connection(&frame);
        self.shared.learn(&frame);
        let fault = self.shared.note(connection, self.direction, frame.name());
        match fault {
            None => self.send(&frame),
            Some(Fault::Drop) => Ok(()),
            Some(Fault::Delay(time)) => self.rest_and_send(Some(time), &frame),
            Some(Fault::Stall(time)) => self.rest_and_send(time, &frame),
            Some(Fault::Truncate) => {
                frame.bytes.truncate(frame.bytes.len() / 2);
                self.send(&frame)?;
                self.to().end();
                self.pair.bell.ring();
                Err(Gone::Woken)
            }
            Some(Fault::Corrupt(part)) => {
                frame.corrupt(part);
                self.send(&frame)
            }
            Some(Fault::Duplicate) => {
                self.send(&frame)?;
                self.send(&frame)
            }
            Some(Fault::Reset) => {
                self.pair.reset();
                Err(Gone::Woken)
            }
            Some(Fault::CutAll) => {
                self.shared.cut_all();
                Err(Gone::Woken)
            }
            Some(Fault::Pace(pace)) => {
                self.shared.set_pace(pace);
                self.send(&frame)
            }
            Some(Fault::Call(When::Before, call)) => {
                call();
                self.send(&frame)
            }
            Some(Fault::Call(When::After, call)) => {
                let sent = self.send(&frame);
                call();
                sent
            }
        }
    }

    /// Passes what is no frame on as it is, and all that follows.
    fn pass_raw(&self, rest: &Frame) -> Result<(), Gone> {
        let connection = self.pair.connection(rest);
        // Remembered only: faults strike messages.
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
    fn receive(&self) -> Result<Received, Gone> {
        let mut frame = Frame {
            bytes: Vec::new(),
            data_at: HEADER,
            files: Vec::new(),
        };
        if !self.fill(&mut frame, HEADER)? {
            return Ok(if frame.bytes.is_empty() {
                Received::End
            } else {
                Received::Other(frame)
            });
        }
        let header = frame.bytes.first_chunk().copied();
        let Some(content) = header.and_then(content_len) else {
            return Ok(Received::Other(frame));
        };
        if !self.fill(&mut frame, content)? {
            return Ok(Received::Other(frame));
        }
        frame.data_at = frame.bytes.len();
        let Some(data) = data_len(&frame.bytes) else {
            return Ok(Received::Other(frame));
        };
        if !self.fill(&mut frame, data)? {
            return Ok(Received::Other(frame));
        }
        Ok(Received::Frame(frame))
    }

    /// Adds so many bytes to the frame. Answers whether they came before the end.
    fn fill(&self, frame: &mut Frame, count: usize) -> Result<bool, Gone> {
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

    fn rest_and_send(&self, time: Option<Duration>, frame: &Frame) -> Result<(), Gone> {
        if self.pair.bell.rest(time) {
            self.send(frame)
        } else {
            Err(Gone::Woken)
        }
    }

    fn send(&self, frame: &Frame) -> Result<(), Gone> {
        let (mut bytes, mut files) = (&frame.bytes[..], &frame.files[..]);
        while !bytes.is_empty() {
            let most = match self.shared.pace() {
                Pace::Free => bytes.len(),
                Pace::Bytes(per_second) => {
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

    fn from(&self) -> &Socket {
        match self.direction {
            Direction::ToDestination => &self.pair.source,
            Direction::ToSource => &self.pair.destination,
        }
    }

    fn to(&self) -> &Socket {
        match self.direction {
            Direction::ToDestination => &self.pair.destination,
            Direction::ToSource => &self.pair.source,
        }
    }
}
