//! Receives from a connection: answers that are waited for, and frames that come while this side sends.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use migration_io::CallProgress;

use super::reader::{Sorted, read};
use super::wait::{self, Patience, Wanted};
use super::{FAREWELL, Link, LinkError};
use crate::protocol::{Frame, Message};

/// The most keep-alives that are accepted in one call.
const MAX_KEEP_ALIVES: usize = 64;

/// A stream may be idle for longer than any migration lasts.
const IDLE: Duration = Duration::from_secs(365 * 24 * 3600);

impl Link<'_> {
    /// An error if the migration was cancelled, or if the peer has aborted, closed the connection or sent anything else
    /// out of turn. Does not wait.
    pub(crate) fn check(&mut self, what: &'static str) -> Result<(), LinkError> {
        self.check_cancel()?;
        for _ in 0..MAX_KEEP_ALIVES {
            match self.poll(what)? {
                None => return Ok(()),
                Some(Sorted::SignOfLife) => {}
                Some(Sorted::Frame(frame)) => {
                    return Err(LinkError::Unexpected {
                        expected: what,
                        got: frame.name(),
                    });
                }
            }
        }
        Err(LinkError::Unexpected {
            expected: what,
            got: "keep-alive after keep-alive",
        })
    }

    /// The next frame that is no keep-alive, from a peer that has to receive so many bytes before, on other
    /// connections: as long as they get fewer it has the time of a step anew. An abort is an error, as is silence.
    fn receive_after(
        &mut self,
        what: &'static str,
        mut in_flight: impl FnMut() -> u64,
    ) -> Result<Frame, LinkError> {
        if let Some(early) = self.early.take() {
            return Ok(early);
        }
        let (mut deadline, mut before) = (Instant::now() + self.step_timeout, in_flight());
        loop {
            self.check_cancel()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let now = in_flight();
                // A peer that sends only keep-alives has the time of one step.
                if now.saturating_add(Patience::QUANTUM as u64) > before {
                    return Err(LinkError::TimedOut {
                        what,
                        after: self.step_timeout,
                    });
                }
                (deadline, before) = (Instant::now() + self.step_timeout, now);
                continue;
            }
            match self.next_frame(self.io_timeout.min(left), what) {
                Err(LinkError::TimedOut { .. }) if Instant::now() >= deadline => {}
                received => match received? {
                    Sorted::SignOfLife => {}
                    Sorted::Frame(frame) => return Ok(frame),
                },
            }
        }
    }

    /// Waits until the peer has sent something or closed the connection, one of `others` is readable, or until `until`;
    /// may return early. Returns whether there is something to receive.
    pub(crate) fn await_peer(
        &self,
        others: &[BorrowedFd<'_>],
        until: Option<Instant>,
    ) -> Result<bool, LinkError> {
        self.check_cancel()?;
        if self.early.is_some() {
            return Ok(true);
        }
        let mut others = others.to_vec();
        others.extend(self.cancellable.then(|| self.control.wake()));
        let ready = wait::wait_with(self.connection, &others, until)?;
        self.check_cancel()?;
        Ok(ready)
    }

    /// The next frame, if it has come whole. Does not wait. An abort is an error, as is a frame that takes longer than
    /// a step.
    pub(crate) fn poll(&mut self, what: &'static str) -> Result<Option<Sorted>, LinkError> {
        match self.early.take() {
            Some(early) => Ok(Some(Sorted::Frame(early))),
            None => self.read_on(what),
        }
    }

    /// Reads what has arrived, up to the end of a frame.
    fn read_on(&mut self, what: &'static str) -> Result<Option<Sorted>, LinkError> {
        let socket = self.connection.as_fd();
        loop {
            match self.reader.step(socket) {
                Ok(CallProgress::Moved(_)) => {}
                Ok(CallProgress::Done) => {
                    if let Some(sorted) = self.reader.parse(what)? {
                        return Ok(Some(sorted));
                    }
                }
                Ok(CallProgress::WouldBlock) if self.frame_due().is_some_and(|due| Instant::now() >= due) => {
                    return Err(LinkError::TimedOut {
                        what,
                        after: self.step_timeout,
                    });
                }
                Ok(CallProgress::WouldBlock) => return Ok(None),
                Err(error) => return Err(LinkError::moving(what, error)),
            }
        }
    }

    /// When the frame that has come in part must be whole, if there is one.
    pub(crate) fn frame_due(&self) -> Option<Instant> {
        self.reader.since().map(|since| since + self.step_timeout)
    }

    /// The next frame of a data stream, which may be idle for as long as the control connection is alive:
    /// the job shuts this connection down when the migration ends.
    pub(crate) fn receive_on_stream(&mut self, what: &'static str) -> Result<Frame, LinkError> {
        match self.next_frame(IDLE, what)? {
            Sorted::Frame(frame) => Ok(frame),
            Sorted::SignOfLife => Err(LinkError::Unexpected {
                expected: what,
                got: Message::KeepAlive.name(),
            }),
        }
    }

    /// The next message.
    pub(crate) fn receive_message(&mut self, what: &'static str) -> Result<Message, LinkError> {
        self.receive_message_after(what, || 0)
    }

    /// The same as [`Link::receive_after`].
    pub(crate) fn receive_message_after(
        &mut self,
        what: &'static str,
        in_flight: impl FnMut() -> u64,
    ) -> Result<Message, LinkError> {
        match self.receive_after(what, in_flight)? {
            Frame::Message(message) => Ok(message),
            frame => Err(LinkError::Unexpected {
                expected: what,
                got: frame.name(),
            }),
        }
    }

    /// Waits a moment for the peer's abort: its data streams end before it comes.
    pub(crate) fn await_abort(&mut self) -> Option<LinkError> {
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

    /// Fills a buffer with bytes that follow a frame.
    pub(super) fn fill(
        &mut self,
        buffer: &mut [u8],
        patience: Patience,
        what: &'static str,
    ) -> Result<(), LinkError> {
        let mut at = 0;
        self.drive(Wanted::Data, patience, what, |socket| {
            let step = read(socket, &mut buffer[at..])?;
            if let CallProgress::Moved(bytes) = step {
                at += bytes;
            }
            Ok(step)
        })?;
        self.bytes_received += buffer.len() as u64;
        Ok(())
    }

    /// The next frame of any kind. An abort is an error.
    fn next_frame(&mut self, silence: Duration, what: &'static str) -> Result<Sorted, LinkError> {
        let mut patience = Patience::new(silence);
        loop {
            let mut reader = std::mem::take(&mut self.reader);
            let read = self.drive(Wanted::Data, patience, what, |socket| reader.step(socket));
            self.reader = reader;
            read?;
            if let Some(sorted) = self.reader.parse(what)? {
                return Ok(sorted);
            }
            // The header is there. A peer that sends a byte now and then gets no longer for a frame than for a step.
            let by = self.frame_due().unwrap_or_else(Instant::now);
            patience = Patience::new(self.io_timeout).by(by);
        }
    }

    /// Reads what the peer sends while this side is sending: a keep-alive, an abort, or the answer to an earlier
    /// message, which is kept until it is asked for.
    pub(super) fn receive_while_sending(&mut self, what: &'static str) -> Result<(), LinkError> {
        match self.read_on(what)? {
            None | Some(Sorted::SignOfLife) => Ok(()),
            Some(Sorted::Frame(frame)) if self.early.is_none() => {
                self.early = Some(frame);
                Ok(())
            }
            Some(Sorted::Frame(frame)) => Err(LinkError::Unexpected {
                expected: what,
                got: frame.name(),
            }),
        }
    }

    /// The peer's abort, if it has come already.
    pub(super) fn pending_abort(&mut self, what: &'static str) -> Option<LinkError> {
        for _ in 0..MAX_KEEP_ALIVES {
            match self.poll(what) {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(error) => return Some(error).filter(LinkError::is_abort),
            }
        }
        None
    }
}
