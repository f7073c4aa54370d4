//! Frames over a connection: one reader that sorts them, and one writer at a time. Every wait is bounded, also if the
//! peer sends a byte now and then, and ends with a cancel.

mod error;
mod files;
mod keep_alive;
mod pages;
mod reader;
mod receive;
mod wait;
mod writer;

pub use error::LinkError;
pub(crate) use keep_alive::KeepAlive;
pub(crate) use reader::{Admitted, Sorted};
pub(crate) use writer::Pulse;

use std::cell::Cell;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use migration_io::{CallProgress, Gather, GuestMemory, MemoryIoError, PageSender, Piece};

use crate::control::Control;
use crate::protocol::{Frame, FrameHeader, FrameKind, HEADER_LEN, Message};
use crate::text::clean;
use crate::transport::Connection;
use reader::{FrameReader, read};
use wait::{Patience, Wanted};
use writer::FrameWriter;

/// How long this side waits for the peer to read an abort and close the connection.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long this side may take, once the migration has to end, to complete a frame that it has begun: the guest may be
/// paused.
const COMPLETION: Duration = Duration::from_millis(20);

/// One side's end of a connection: the only reader of it. A [`Pulse`] may send on it as well, frame by frame.
pub(crate) struct Link<'a> {
    connection: &'a Connection,
    control: &'a Control,
    io_timeout: Duration,
    step_timeout: Duration,
    cancellable: bool,
    /// Whether to receive while sending.
    receives: bool,
    reader: FrameReader,
    /// An answer that came while something was being sent. There is never more than one.
    early: Option<Frame>,
    writer: Arc<FrameWriter>,
    /// How much of the last frame the kernel accepted.
    sent: Sent,
    /// The counter to which bytes are added as they come, if there is one.
    arrivals: Option<&'a AtomicU64>,
    /// On a data stream: sends without a copy where that works.
    sender: Option<PageSender>,
    /// On a data stream: wakes this side only for pieces of some size.
    receiver: Option<migration_io::PageReceiver>,
    bytes_sent: u64,
    bytes_received: u64,
}

/// How much of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Nothing,
    Part,
    Whole,
}

impl<'a> Link<'a> {
    pub(crate) fn new(
        connection: &'a Connection,
        control: &'a Control,
        io_timeout: Duration,
        step_timeout: Duration,
    ) -> Self {
        Self {
            connection,
            control,
            io_timeout,
            step_timeout,
            cancellable: true,
            receives: true,
            reader: FrameReader::default(),
            early: None,
            writer: Arc::new(FrameWriter::new()),
            sent: Sent::Nothing,
            arrivals: None,
            sender: None,
            receiver: None,
            bytes_sent: 0,
            bytes_received: 0,
        }
    }

    /// Bytes that the kernel has accepted so far.
    pub(crate) fn bytes_sent(&self) -> u64 {
        self.bytes_sent
    }

    /// Bytes received so far.
    pub(crate) fn bytes_received(&self) -> u64 {
        self.bytes_received + self.reader.received()
    }

    /// Whether the kernel accepted a part of the last frame, or all of it.
    pub(crate) fn has_begun(&self) -> bool {
        self.sent != Sent::Nothing
    }

    /// Whether the kernel accepted all of the last frame, even if the call returned an interruption.
    pub(crate) fn has_sent(&self) -> bool {
        self.sent == Sent::Whole
    }

    /// A sender of keep-alives on this connection, for another thread.
    pub(crate) fn pulse(&self) -> Pulse<'a> {
        Pulse {
            connection: self.connection,
            writer: self.writer.clone(),
        }
    }

    /// From here on these frames are accepted; before, only short messages.
    pub(crate) fn admit(&mut self, admitted: Admitted) {
        self.reader.admit(admitted);
    }

    /// Counts bytes as they come: the end of a batch alone would show too late that the peer is sending.
    pub(crate) fn count_arrivals(&mut self, arrivals: &'a AtomicU64) {
        self.arrivals = Some(arrivals);
    }

    /// From here on a cancel does not end waits on this connection.
    pub(crate) fn ignore_cancel(&mut self) {
        self.cancellable = false;
    }

    /// For a data stream, on which the peer sends nothing: nothing is received while sending.
    pub(crate) fn set_send_only(&mut self) {
        self.receives = false;
    }

    /// Sends a message.
    pub(crate) fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        self.send_bytes(&[&encode_frame(message)?], message.name())
    }

    /// Sends the machine's state.
    pub(crate) fn send_state(&mut self, state: &[u8]) -> Result<(), LinkError> {
        self.send_frame(FrameKind::State, state, "the state")
    }

    /// Sends a part of the machine's state for a rehearsal.
    pub(crate) fn send_rehearsal(&mut self, state: &[u8]) -> Result<(), LinkError> {
        self.send_frame(FrameKind::Rehearsal, state, "a rehearsal")
    }

    /// Sends an abort and waits a moment for the peer to close the connection: to close it here with data unread would
    /// remove the message from the peer's buffer. Returns whether the peer closed it, and so has read the abort.
    pub(crate) fn abort(&mut self, cancelled: bool, reason: &str) -> bool {
        self.ignore_cancel();
        self.io_timeout = self.io_timeout.min(FAREWELL);
        let abort = Message::Abort {
            cancelled,
            reason: clean(reason),
        };
        self.send(&abort).is_ok() && self.hang_up()
    }

    /// Closes the connection in both directions.
    pub(crate) fn close(&self) {
        // Fails only if the connection has ended already.
        let _ = self.connection.shutdown(Shutdown::Both);
    }

    /// Closes this side's direction and reads for a moment, until the peer closes its own. Returns whether it did.
    pub(crate) fn hang_up(&mut self) -> bool {
        self.ignore_cancel();
        let deadline = Instant::now() + self.io_timeout.min(FAREWELL);
        if self.connection.shutdown(Shutdown::Write).is_err() {
            return false;
        }
        let mut rest = [0; 4096];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let ended = self.drive(Wanted::Data, Patience::new(left), "the end", |socket| match read(
                socket, &mut rest,
            )? {
                CallProgress::Moved(_) => Ok(CallProgress::Done),
                step => Ok(step),
            });
            match ended {
                Ok(()) => {}
                Err(error) => return matches!(error, LinkError::Closed { .. }),
            }
        }
    }

    fn send_frame(&mut self, kind: FrameKind, content: &[u8], what: &'static str) -> Result<(), LinkError> {
        let header = encode_header(kind, content.len(), what)?;
        self.send_bytes(&[&header, content], what)
    }

    fn send_bytes(&mut self, parts: &[&[u8]], what: &'static str) -> Result<(), LinkError> {
        let none = GuestMemory::new();
        let gather = Gather::new(&none, parts.iter().map(|part| Piece::Bytes(part)))
            .map_err(|source| LinkError::Io { what, source })?;
        let len = parts.iter().map(|part| part.len() as u64).sum();
        self.transmit(gather, len, what)
    }

    fn transmit(&mut self, mut gather: Gather<'_>, len: u64, what: &'static str) -> Result<(), LinkError> {
        let mut sender = self.sender.take();
        let sent = self.send_whole(len, what, |socket| match &mut sender {
            Some(sender) => sender.send(&mut gather, socket),
            None => gather.step(socket),
        });
        self.sender = sender;
        sent
    }

    /// Sends one frame. The lock keeps keep-alives from the connection meanwhile.
    fn send_whole(
        &mut self,
        len: u64,
        what: &'static str,
        mut step: impl FnMut(BorrowedFd<'_>) -> Result<CallProgress, MemoryIoError>,
    ) -> Result<(), LinkError> {
        self.sent = Sent::Nothing;
        self.check_cancel()?;
        let writer = self.writer.clone();
        let mut state = writer.lock();
        state.check(what)?;
        let patience = Patience::new(self.io_timeout);
        self.drive(Wanted::Room, patience.clone(), what, |socket| {
            state.send_rest(socket)
        })?;
        state.torn = true;
        let begun = Cell::new(false);
        let mut step = |socket: BorrowedFd<'_>| {
            let step = step(socket)?;
            begun.set(begun.get() || step != CallProgress::WouldBlock);
            Ok(step)
        };
        let mut result = self.drive(Wanted::Room, patience, what, &mut step);
        let interruption = match result {
            Err(error) if error.is_interruption() => {
                result = Err(LinkError::Cancelled);
                Some(error)
            }
            _ => None,
        };
        if interruption.is_some() && begun.get() && self.receives {
            // After half a frame the peer could not read the abort that follows: takes a moment to complete it.
            self.ignore_cancel();
            result = self.drive(Wanted::Room, Patience::new(COMPLETION), what, &mut step);
        }
        self.sent = match &result {
            Ok(()) => Sent::Whole,
            Err(_) if begun.get() => Sent::Part,
            Err(_) => Sent::Nothing,
        };
        state.torn = self.sent == Sent::Part;
        state.last = Instant::now();
        drop(state);
        if let Some(interruption) = interruption {
            return Err(interruption);
        }
        match result {
            Ok(()) => {
                self.bytes_sent += len;
                Ok(())
            }
            // The peer may have sent an abort before it closed the connection.
            Err(lost @ LinkError::Io { .. }) if self.receives => {
                Err(self.pending_abort(what).unwrap_or(lost))
            }
            Err(error) => Err(error),
        }
    }

    /// Moves bytes until a step says that it is done.
    fn drive(
        &mut self,
        wanted: Wanted,
        mut patience: Patience,
        what: &'static str,
        mut step: impl FnMut(BorrowedFd<'_>) -> Result<CallProgress, MemoryIoError>,
    ) -> Result<(), LinkError> {
        loop {
            match step(self.connection.as_fd()).map_err(|error| LinkError::moving(what, error))? {
                CallProgress::Done => return Ok(()),
                CallProgress::Moved(bytes) => {
                    patience.reward(bytes);
                    if let (Wanted::Data, Some(arrivals)) = (wanted, self.arrivals) {
                        arrivals.fetch_add(bytes as u64, Ordering::Relaxed);
                    }
                }
                CallProgress::WouldBlock => {
                    let wake = self.cancellable.then(|| self.control.wake());
                    let wanted = if self.receives { wanted } else { wanted.alone() };
                    let ready = wait::wait(self.connection, wanted, wake, &patience, what);
                    if ready.map_err(|error| self.reason(error))? {
                        self.receive_while_sending(what)?;
                    }
                }
            }
        }
    }

    fn check_cancel(&self) -> Result<(), LinkError> {
        match self.control.interruption().filter(|_| self.cancellable) {
            Some(interruption) => Err(interruption.into()),
            None => Ok(()),
        }
    }

    /// Replaces the error of a wait that was woken by its cause: a cancel or the limit of the pause.
    fn reason(&self, error: LinkError) -> LinkError {
        match error {
            LinkError::Cancelled => self.control.interruption().map_or(error, LinkError::from),
            error => error,
        }
    }
}

fn encode_header(kind: FrameKind, len: usize, what: &'static str) -> Result<[u8; HEADER_LEN], LinkError> {
    let header = FrameHeader::new(kind, len).map_err(|source| LinkError::TooLong { what, source })?;
    Ok(header.encode())
}

/// A message as the bytes of a frame.
fn encode_frame(message: &Message) -> Result<Vec<u8>, LinkError> {
    let what = message.name();
    let content = postcard::to_stdvec(message).map_err(|source| LinkError::Encode { what, source })?;
    let header = encode_header(FrameKind::Control, content.len(), what)?;
    Ok([&header[..], &content].concat())
}
