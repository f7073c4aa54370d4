//! Frames as far as a bystander has to understand them: where each ends, and what it is.

use std::os::fd::OwnedFd;

use crate::fault::{FramePart, ProxyConnection};

/// Bytes of a header: kind, three zeroes, length of the content (little-endian).
pub(crate) const HEADER: usize = 8;
/// No frame of the protocol has a longer content.
const MAX_CONTENT: usize = 64 << 20;
/// No table announces more.
const MAX_DATA: u64 = 1 << 20;

const CONTROL: u8 = 1;
const PAGES: u8 = 2;
const COMPRESSED: u8 = 4;

/// Control messages by their number.
const MESSAGES: [&str; 26] = [
    "hello",
    "begin",
    "session",
    "join",
    "joined",
    "ask",
    "outcome",
    "ping",
    "pong",
    "describe",
    "memory files",
    "accept",
    "refuse",
    "populated",
    "round end",
    "round ack",
    "rehearsed",
    "digest request",
    "digest",
    "ready",
    "go",
    "resumed",
    "resume failed",
    "farewell",
    "abort",
    "keep-alive",
];

/// A frame and what follows it.
#[derive(Debug)]
pub(crate) struct ProxyFrame {
    pub(crate) bytes: Vec<u8>,
    /// Where the data after the content begins.
    pub(crate) data_at: usize,
    /// Open files that came with it.
    pub(crate) files: Vec<OwnedFd>,
}

/// The length of the content behind a header, or nothing if this is no frame of the protocol.
pub(crate) fn content_len(header: [u8; HEADER]) -> Option<usize> {
    let [1..=5, 0, 0, 0, a, b, c, d] = header else {
        return None;
    };
    let len = u32::from_le_bytes([a, b, c, d]) as usize;
    (len <= MAX_CONTENT).then_some(len)
}

/// Bytes that follow a frame, as its content says; nothing if the content makes no sense.
pub(crate) fn data_len(frame: &[u8]) -> Option<usize> {
    let (kind, mut content) = (*frame.first()?, VarintReader(frame.get(HEADER..)?));
    let len = match kind {
        PAGES => content.spans()?,
        COMPRESSED => {
            content.varint()?;
            content.spans()?;
            content.varint()?
        }
        _ => 0,
    };
    (len <= MAX_DATA).then_some(len as usize)
}

impl ProxyFrame {
    /// What `PROTOCOL.md` calls it.
    pub(crate) fn name(&self) -> String {
        match self.bytes[0] {
            CONTROL => match self.bytes.get(HEADER) {
                Some(number) => MESSAGES
                    .get(usize::from(*number))
                    .map_or_else(|| format!("message {number}"), |name| (*name).into()),
                None => "empty message".into(),
            },
            PAGES => "pages".into(),
            3 => "state".into(),
            COMPRESSED => "compressed pages".into(),
            _ => "rehearsal".into(),
        }
    }

    /// What a connection is for, if this message says so.
    pub(crate) fn purpose(&self) -> Option<ProxyConnection> {
        match self.name().as_str() {
            "begin" => Some(ProxyConnection::Control),
            "ask" => Some(ProxyConnection::Ask),
            // Number, token of 16 bytes, index.
            "join" => {
                let index = VarintReader(self.bytes.get(HEADER + 17..)?).varint()?;
                Some(ProxyConnection::Stream(u32::try_from(index).ok()?))
            }
            _ => None,
        }
    }

    /// How many streams are to come, if this message says so.
    pub(crate) fn streams(&self) -> Option<u32> {
        match (self.name().as_str(), &self.bytes[..]) {
            // The plan comes last: 0 and the number, at most 32 and so one byte. That of a handover can look the
            // same, but is followed by the next message.
            ("describe", [.., 0, count]) => Some((*count).into()),
            ("describe" | "memory files", _) => Some(0),
            _ => None,
        }
    }

    /// Flips a bit.
    pub(crate) fn corrupt(&mut self, part: FramePart) {
        let range = match part {
            FramePart::Kind => 0..1,
            FramePart::Length => 4..5,
            FramePart::Data if self.data_at < self.bytes.len() => self.data_at..self.bytes.len(),
            FramePart::Content | FramePart::Data => HEADER..self.data_at,
        };
        let at = if range.is_empty() {
            0
        } else {
            range.start + range.len() / 2
        };
        self.bytes[at] ^= if at == 0 { 0x40 } else { 1 };
    }
}

/// Reads postcard's varints.
struct VarintReader<'a>(&'a [u8]);

impl VarintReader<'_> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// The sum of the lengths of a list of ranges.
    fn spans(&mut self) -> Option<u64> {
        let mut sum = 0u64;
        for _ in 0..self.varint()? {
            self.varint()?;
            sum = sum.saturating_add(self.varint()?);
        }
        Some(sum)
    }
}
