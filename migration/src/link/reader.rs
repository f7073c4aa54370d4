//! Reads frames piece by piece and sorts them by what they mean for the wait under way. Nothing here waits.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use migration_io::{CallProgress, MemoryIoError};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::LinkError;
use crate::protocol::{Frame, FrameHeader, FrameKind, HEADER_LEN, Message, ProtocolError};
use crate::text::clean;

/// Content is received in pieces of this size, so that a header alone cannot make this side allocate.
const CONTENT_PIECE: usize = 256 << 10;

/// Longest message, in bytes, where only short ones are due: the longest reason for a refusal fits.
const SHORT: u32 = 8 << 10;

/// Which frames a connection may bring, by how far it has got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Admitted {
    /// Short messages: the peer has not said yet what the connection is for, or its exchange is over.
    #[default]
    Greeting,
    /// Messages of any length.
    Messages,
    /// The same, rehearsals and the state.
    Machine,
    /// Short messages and pages.
    Pages,
}

/// A frame that came, sorted by what it means for the wait that is under way. An abort is an error instead. A kind of
/// message that no side waits for, should there ever be one, gets a variant of its own here, so that it neither counts
/// as an answer nor as out of turn.
#[derive(Debug)]
pub(crate) enum Sorted {
    /// The peer is alive; there is nothing more to it.
    SignOfLife,
    /// Any other frame. The code that waits for an answer decides whether it is the peer's turn to send it.
    Frame(Frame),
}

/// The receiving side of a connection, with the frame that is under way.
#[derive(Debug, Default)]
pub(super) struct FrameReader {
    admitted: Admitted,
    head: [u8; HEADER_LEN],
    /// Bytes of the header that are there.
    head_len: usize,
    /// The header, once it is whole and admitted.
    header: Option<FrameHeader>,
    content: Vec<u8>,
    /// Bytes of the content that are there.
    content_len: usize,
    /// When the frame's first byte came.
    since: Option<Instant>,
    received: u64,
}

impl FrameReader {
    /// From here on these frames are accepted.
    pub(super) fn admit(&mut self, admitted: Admitted) {
        self.admitted = admitted;
    }

    /// Bytes of frames received so far.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// When the first byte of the frame that is under way came, if one is.
    pub(super) fn since(&self) -> Option<Instant> {
        self.since
    }

    /// Reads on. [`CallProgress::Done`] means that the header or the content is whole: [`FrameReader::parse`] is next.
    pub(super) fn step(&mut self, socket: BorrowedFd<'_>) -> Result<CallProgress, MemoryIoError> {
        let Some(header) = self.header else {
            let step = read(socket, &mut self.head[self.head_len..])?;
            if let CallProgress::Moved(bytes) = step {
                self.head_len += bytes;
                self.count(bytes);
            }
            return Ok(step);
        };
        let left = header.len as usize - self.content_len;
        if left > 0 && self.content.len() == self.content_len {
            self.content.resize(self.content_len + left.min(CONTENT_PIECE), 0);
        }
        let step = read(socket, &mut self.content[self.content_len..])?;
        if let CallProgress::Moved(bytes) = step {
            self.content_len += bytes;
            self.count(bytes);
        }
        Ok(step)
    }

    /// Stores a header that was read by other code.
    pub(super) fn put_header(&mut self, head: [u8; HEADER_LEN]) {
        self.head = head;
        self.head_len = HEADER_LEN;
        self.count(HEADER_LEN);
    }

    /// Parses what [`FrameReader::step`] has completed. Returns `None` after a header: its content is next.
    pub(super) fn parse(&mut self, what: &'static str) -> Result<Option<Sorted>, LinkError> {
        let malformed = |source| LinkError::Protocol {
            expected: what,
            source,
        };
        let Some(header) = self.header else {
            let header = FrameHeader::decode(self.head).map_err(malformed)?;
            self.admitted.check(header, what)?;
            self.header = Some(header);
            return Ok(None);
        };
        if self.content_len < header.len as usize {
            return Ok(None);
        }
        let content = std::mem::take(&mut self.content);
        (self.header, self.head_len, self.content_len, self.since) = (None, 0, 0, None);
        match Frame::decode(header.kind, content).map_err(malformed)? {
            Frame::Message(Message::Abort { cancelled, reason }) => Err(LinkError::Aborted {
                cancelled,
                reason: clean(&reason),
            }),
            Frame::Message(Message::KeepAlive) => Ok(Some(Sorted::SignOfLife)),
            frame => Ok(Some(Sorted::Frame(frame))),
        }
    }

    fn count(&mut self, bytes: usize) {
        if bytes > 0 {
            self.since.get_or_insert_with(Instant::now);
        }
        self.received += bytes as u64;
    }
}

impl Admitted {
    /// Most bytes of a frame's content; `None` if no such frame is due.
    fn limit(self, kind: FrameKind) -> Option<u32> {
        match (self, kind) {
            (Admitted::Greeting | Admitted::Pages, FrameKind::Control) => Some(SHORT),
            (Admitted::Messages | Admitted::Machine, FrameKind::Control)
            | (Admitted::Machine, FrameKind::State | FrameKind::Rehearsal)
            | (Admitted::Pages, FrameKind::Pages | FrameKind::Compressed) => Some(kind.limit()),
            _ => None,
        }
    }

    /// Refuses a frame before a byte of its content is read.
    fn check(self, header: FrameHeader, what: &'static str) -> Result<(), LinkError> {
        match self.limit(header.kind) {
            None => Err(LinkError::Unexpected {
                expected: what,
                got: header.kind.name(),
            }),
            Some(limit) if header.len > limit => Err(LinkError::Protocol {
                expected: what,
                source: ProtocolError::TooLong {
                    kind: header.kind.name(),
                    limit,
                    got: header.len,
                },
            }),
            Some(_) => Ok(()),
        }
    }
}

/// Reads into a buffer. An empty buffer is done at once.
pub(super) fn read(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<CallProgress, MemoryIoError> {
    if buffer.is_empty() {
        return Ok(CallProgress::Done);
    }
    match recv(socket, buffer, RecvFlags::DONTWAIT) {
        Ok((_, 0)) => Err(MemoryIoError::Closed),
        Ok((_, bytes)) => Ok(CallProgress::Moved(bytes)),
        Err(Errno::AGAIN) => Ok(CallProgress::WouldBlock),
        Err(Errno::INTR) => Ok(CallProgress::Moved(0)),
        Err(error) => Err(MemoryIoError::Socket(error.into())),
    }
}
