//! Frames over a connection: every wait bounded, woken by cancel, and deaf to a peer that trickles.

mod error;
mod files;
mod keep_alive;
mod pages;
mod wait;

pub use error::LinkError;
pub(crate) use keep_alive::KeepAlive;

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use migration_io::{Gather, GuestMemory, MemoryIoError, Piece, Sender, Step};
use rustix::net::{RecvFlags, recv};

use crate::control::Control;
use crate::protocol::{Frame, HEADER_LEN, Header, Kind, Message};
use crate::text::clean;
use crate::transport::Connection;
use wait::{Patience, Wanted};

/// Content is received in pieces of this size, so that a header alone cannot make us allocate.
const CONTENT_PIECE: usize = 256 << 10;

/// More of them at once are no signs of life.
const MAX_KEEP_ALIVES: usize = 64;

/// A stream may be idle for longer than any migration lasts.
const IDLE: Duration = Duration::from_secs(365 * 24 * 3600);

/// The longest that an end waits for the other one to read its last words.
const FAREWELL: Duration = Duration::from_secs(1);

/// One side's end of the connection.
pub(crate) struct Link<'a> {
    connection: &'a Connection,
    control: &'a Control,
    io_timeout: Duration,
    step_timeout: Duration,
    heed_cancel: bool,
    /// Whether to hear what the peer says while we send.
    listen: bool,
    /// Whether a frame was sent in part only, so that nothing can follow it.
    torn: bool,
    /// On a data stream: sends without a copy where that works.
    sender: Option<Sender>,
    /// On a data stream: is woken for pieces that are worth it.
    receiver: Option<migration_io::Receiver>,
    bytes_sent: u64,
    bytes_received: u64,
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
            heed_cancel: true,
            listen: true,
            torn: false,
            sender: None,
            receiver: None,
            bytes_sent: 0,
            bytes_received: 0,
        }
    }

    /// Bytes handed to the system so far.
    pub(crate) fn bytes_sent(&self) -> u64 {
        self.bytes_sent
    }

    /// Bytes received so far.
    pub(crate) fn bytes_received(&self) -> u64 {
        self.bytes_received
    }

    /// Whether the last frame was sent in part only.
    pub(crate) fn is_torn(&self) -> bool {
        self.torn
    }

    /// From here on cancel comes too late.
    pub(crate) fn ignore_cancel(&mut self) {
        self.heed_cancel = false;
    }

    /// For a link that only sends while another one to the same peer does the listening.
    pub(crate) fn only_send(&mut self) {
        self.listen = false;
    }

    /// An error if somebody asked for the end, or if the peer has given up or gone while it had nothing to
    /// say. Does not wait.
    pub(crate) fn check(&mut self, what: &'static str) -> Result<(), LinkError> {
        self.check_cancel()?;
        for _ in 0..MAX_KEEP_ALIVES {
            if !wait::ready_now(self.connection)? {
                return Ok(());
            }
            self.listen(what)?;
        }
        Err(LinkError::Unexpected {
            expected: what,
            got: "keep-alive after keep-alive",
        })
    }

    /// Sends a message.
    pub(crate) fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        let what = message.name();
        let content = postcard::to_stdvec(message).map_err(|source| LinkError::Encode { what, source })?;
        self.send_frame(Kind::Control, &content, what)
    }

    /// Waits so long, or until somebody asks for the end.
    pub(crate) fn pause(&mut self, time: Duration) -> Result<(), LinkError> {
        self.check_cancel()?;
        if time.is_zero() {
            return Ok(());
        }
        wait::rest(self.control.wake(), time)?;
        self.check_cancel()
    }

    /// Sends the machine's state.
    pub(crate) fn send_state(&mut self, state: &[u8]) -> Result<(), LinkError> {
        self.send_frame(Kind::State, state, "the state")
    }

    /// Sends a part of the machine's state, for practice.
    pub(crate) fn send_rehearsal(&mut self, state: &[u8]) -> Result<(), LinkError> {
        self.send_frame(Kind::Rehearsal, state, "a rehearsal")
    }

    /// The next frame that is no keep-alive. An abort is an error, as is silence.
    pub(crate) fn receive(&mut self, what: &'static str) -> Result<Frame, LinkError> {
        let deadline = Instant::now() + self.step_timeout;
        loop {
            self.check_cancel()?;
            // A peer that only keeps itself alive has the time of one step, no more.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LinkError::TimedOut {
                    what,
                    after: self.step_timeout,
                });
            }
            match self.next_frame(self.io_timeout.min(left), what)? {
                Frame::Message(Message::KeepAlive) => {}
                frame => return Ok(frame),
            }
        }
    }

    /// Waits until the peer says something or hangs up, one of `others` is readable, or until a moment; may come
    /// back early. Answers whether the peer has something to be received.
    pub(crate) fn await_peer(
        &self,
        others: &[BorrowedFd<'_>],
        until: Option<Instant>,
    ) -> Result<bool, LinkError> {
        self.check_cancel()?;
        let mut others = others.to_vec();
        others.extend(self.heed_cancel.then(|| self.control.wake()));
        let ready = wait::wait_with(self.connection, &others, until)?;
        self.check_cancel()?;
        Ok(ready)
    }

    /// The next frame, a keep-alive as well. An abort is an error.
    pub(crate) fn receive_any(&mut self, what: &'static str) -> Result<Frame, LinkError> {
        self.next_frame(self.io_timeout, what)
    }

    /// The next frame of a data stream, which may be idle for as long as the control connection is alive:
    /// whoever ends the migration shuts this connection down.
    pub(crate) fn receive_on_stream(&mut self, what: &'static str) -> Result<Frame, LinkError> {
        self.next_frame(IDLE, what)
    }

    /// The next message.
    pub(crate) fn receive_message(&mut self, what: &'static str) -> Result<Message, LinkError> {
        match self.receive(what)? {
            Frame::Message(message) => Ok(message),
            frame => Err(LinkError::Unexpected {
                expected: what,
                got: frame.name(),
            }),
        }
    }

    /// Why the peer gave up, if it says so within a moment: the data streams end first.
    pub(crate) fn last_words(&mut self) -> Option<LinkError> {
        let until = Instant::now() + FAREWELL;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            match self.next_frame(left, "why the peer gave up") {
                Ok(_) => {}
                Err(error) => return Some(error).filter(LinkError::is_abort),
            }
        }
    }

    /// Tells the peer that it is over, and waits a moment for it to hang up: a connection that is closed with
    /// data unread would take the message back from the peer's buffer. Answers whether the peer has hung up,
    /// and so has heard it.
    pub(crate) fn abort(&mut self, cancelled: bool, reason: &str) -> bool {
        self.ignore_cancel();
        self.io_timeout = self.io_timeout.min(FAREWELL);
        let abort = Message::Abort {
            cancelled,
            reason: clean(reason),
        };
        !self.torn && self.send(&abort).is_ok() && self.hang_up()
    }

    /// Ends the connection: there is nothing more to say or to hear.
    pub(crate) fn close(&self) {
        // One that has ended by itself is what is wanted.
        let _ = self.connection.shutdown(Shutdown::Both);
    }

    /// Ends our direction and reads what still comes until the peer ends its own, for a moment. Answers whether
    /// it did.
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
            match self.fill(&mut rest, Patience::new(left), "the end") {
                Ok(()) => {}
                Err(error) => return matches!(error, LinkError::Closed { .. }),
            }
        }
    }

    fn send_frame(&mut self, kind: Kind, content: &[u8], what: &'static str) -> Result<(), LinkError> {
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
        self.check_cancel()?;
        let mut moved = false;
        let mut sender = self.sender.take();
        let mut step = |socket: BorrowedFd<'_>| {
            let step = match &mut sender {
                Some(sender) => sender.send(&mut gather, socket)?,
                None => gather.step(socket)?,
            };
            moved |= step != Step::WouldBlock;
            Ok(step)
        };
        let mut result = self.drive(Wanted::Room, Patience::new(self.io_timeout), what, &mut step);
        let cancelled = matches!(result, Err(LinkError::Cancelled));
        if cancelled && self.listen {
            // Half a frame would make nonsense of the abort that follows: a moment to complete it.
            self.ignore_cancel();
            result = self.drive(Wanted::Room, Patience::new(FAREWELL), what, &mut step);
        }
        self.torn = result.is_err() && moved;
        self.sender = sender;
        match result {
            _ if cancelled => Err(LinkError::Cancelled),
            Ok(()) => {
                self.bytes_sent += len;
                Ok(())
            }
            // The peer may have said why before it went.
            Err(LinkError::Io {
                what,
                source: MemoryIoError::Socket(error),
            }) => {
                let lost = LinkError::Io {
                    what,
                    source: MemoryIoError::Socket(error),
                };
                Err(if self.listen {
                    self.check(what).err().filter(LinkError::is_abort).unwrap_or(lost)
                } else {
                    lost
                })
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
        mut step: impl FnMut(BorrowedFd<'_>) -> Result<Step, MemoryIoError>,
    ) -> Result<(), LinkError> {
        loop {
            match step(self.connection.as_fd()).map_err(|error| LinkError::moving(what, error))? {
                Step::Done => return Ok(()),
                Step::Moved(bytes) => patience.reward(bytes),
                Step::WouldBlock => {
                    let wake = self.heed_cancel.then(|| self.control.wake());
                    let wanted = if self.listen { wanted } else { wanted.alone() };
                    if wait::wait(self.connection, wanted, wake, &patience, what)? {
                        self.listen(what)?;
                    }
                }
            }
        }
    }

    /// Fills a buffer of our own.
    fn fill(&mut self, buffer: &mut [u8], patience: Patience, what: &'static str) -> Result<(), LinkError> {
        let (mut at, len) = (0, buffer.len());
        self.drive(Wanted::Data, patience, what, |socket| {
            if at == len {
                return Ok(Step::Done);
            }
            match recv(socket, &mut buffer[at..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => Err(MemoryIoError::Closed),
                Ok((_, bytes)) => {
                    at += bytes;
                    Ok(if at == len { Step::Done } else { Step::Moved(bytes) })
                }
                Err(rustix::io::Errno::AGAIN) => Ok(Step::WouldBlock),
                Err(rustix::io::Errno::INTR) => Ok(Step::Moved(0)),
                Err(error) => Err(MemoryIoError::Socket(error.into())),
            }
        })?;
        self.bytes_received += len as u64;
        Ok(())
    }

    /// The next frame of any kind. An abort is an error.
    fn next_frame(&mut self, silence: Duration, what: &'static str) -> Result<Frame, LinkError> {
        let malformed = |source| LinkError::Protocol {
            expected: what,
            source,
        };
        let mut header = [0; HEADER_LEN];
        self.fill(&mut header, Patience::new(silence), what)?;
        self.rest_of_frame(Header::decode(header).map_err(malformed)?, what)
    }

    /// The content that a header announces. An abort is an error.
    fn rest_of_frame(&mut self, header: Header, what: &'static str) -> Result<Frame, LinkError> {
        let malformed = |source| LinkError::Protocol {
            expected: what,
            source,
        };
        // A peer that trickles does not get longer for a frame than for a step.
        let by = Instant::now() + self.step_timeout;
        let mut content = Vec::new();
        let mut left = header.len as usize;
        while left > 0 {
            let (at, piece) = (content.len(), left.min(CONTENT_PIECE));
            content.resize(at + piece, 0);
            self.fill(&mut content[at..], Patience::new(self.io_timeout).by(by), what)?;
            left -= piece;
        }
        match Frame::decode(header.kind, content).map_err(malformed)? {
            Frame::Message(Message::Abort { cancelled, reason }) => Err(LinkError::Aborted {
                cancelled,
                reason: clean(&reason),
            }),
            frame => Ok(frame),
        }
    }

    /// Hears a peer that should be silent: it may be alive, or say why it gives up.
    fn listen(&mut self, what: &'static str) -> Result<(), LinkError> {
        match self.next_frame(self.io_timeout, what)? {
            Frame::Message(Message::KeepAlive) => Ok(()),
            frame => Err(LinkError::Unexpected {
                expected: what,
                got: frame.name(),
            }),
        }
    }

    fn check_cancel(&self) -> Result<(), LinkError> {
        if self.heed_cancel && self.control.is_cancelled() {
            Err(LinkError::Cancelled)
        } else {
            Ok(())
        }
    }
}

fn encode_header(kind: Kind, len: usize, what: &'static str) -> Result<[u8; HEADER_LEN], LinkError> {
    let header = Header::new(kind, len).map_err(|source| LinkError::TooLong { what, source })?;
    Ok(header.encode())
}
