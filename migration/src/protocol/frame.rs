//! Frames: an eight-byte header and a bounded content.

use migration_io::{MemoryRange, PAGE_SIZE};
use serde::{Deserialize, Serialize};

use super::{Message, ProtocolError};
use crate::options::Compression;

/// Bytes of a frame's header: kind, three zeroes, length of the content as u32 (little-endian).
pub(crate) const HEADER_LEN: usize = 8;
/// Most bytes of page content that follow one table.
pub(crate) const MAX_BATCH_BYTES: u64 = 1 << 20;
/// Most ranges of either sort in one table.
pub(crate) const MAX_BATCH_RANGES: usize = 256;
/// Most bytes of zero pages in one table: bounds what one small frame can make the destination do.
const MAX_BATCH_ZERO_BYTES: u64 = MAX_BATCH_BYTES * MAX_BATCH_RANGES as u64;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FrameKind {
    /// A [`Message`].
    Control = 1,
    /// A [`PageTable`]; the pages' content follows the frame.
    Pages = 2,
    /// The machine's state.
    State = 3,
    /// A [`CompressedTable`]; the compressed bytes follow the frame.
    Compressed = 4,
    /// A part of the machine's state, for a rehearsal.
    Rehearsal = 5,
}

/// A frame's header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    pub(crate) kind: FrameKind,
    /// Bytes of the content, within the kind's limit.
    pub(crate) len: u32,
}

/// A frame from the peer, checked as far as that is possible without a machine.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Frame {
    Message(Message),
    Pages(PageTable),
    State(Vec<u8>),
    Compressed(CompressedTable),
    Rehearsal(Vec<u8>),
}

/// Pages whose content follows the frame as one compressed block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CompressedTable {
    pub(crate) method: Compression,
    /// The pages, in the order of their content; at most [`MAX_BATCH_BYTES`] in all.
    pub(crate) pages: Vec<Span>,
    /// Bytes that follow, fewer than those of the pages.
    pub(crate) len: u32,
}

/// Which pages come, and which are zero.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PageTable {
    /// Pages whose content follows the frame, in this order.
    pub(crate) data: Vec<Span>,
    /// Pages that hold nothing but zeroes.
    pub(crate) zero: Vec<Span>,
}

/// A range of pages on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Span {
    pub(crate) gpa: u64,
    pub(crate) len: u64,
}

impl FrameKind {
    /// Most bytes of a frame's content.
    pub(crate) fn limit(self) -> u32 {
        match self {
            FrameKind::Control => 1 << 20,
            FrameKind::Pages | FrameKind::Compressed => 16 << 10,
            FrameKind::State | FrameKind::Rehearsal => migration_state::MAX_ENCODED_LEN as u32,
        }
    }

    /// What it is, for errors.
    pub(crate) fn name(self) -> &'static str {
        match self {
            FrameKind::Control => "control",
            FrameKind::Pages => "pages",
            FrameKind::State => "state",
            FrameKind::Compressed => "compressed pages",
            FrameKind::Rehearsal => "rehearsal",
        }
    }
}

impl FrameHeader {
    /// A header for content of a length that the kind allows.
    pub(crate) fn new(kind: FrameKind, len: usize) -> Result<Self, ProtocolError> {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        if len > kind.limit() {
            return Err(ProtocolError::TooLong {
                kind: kind.name(),
                limit: kind.limit(),
                got: len,
            });
        }
        Ok(Self { kind, len })
    }

    pub(crate) fn encode(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = self.kind as u8;
        bytes[4..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: [u8; HEADER_LEN]) -> Result<Self, ProtocolError> {
        let [kind, 0, 0, 0, a, b, c, d] = bytes else {
            return Err(ProtocolError::FrameHeader { got: bytes });
        };
        let kind = match kind {
            1 => FrameKind::Control,
            2 => FrameKind::Pages,
            3 => FrameKind::State,
            4 => FrameKind::Compressed,
            5 => FrameKind::Rehearsal,
            _ => return Err(ProtocolError::FrameHeader { got: bytes }),
        };
        Self::new(kind, u32::from_le_bytes([a, b, c, d]) as usize)
    }
}

impl Frame {
    /// What it is, for errors.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Frame::Message(message) => message.name(),
            Frame::Pages(_) => "pages",
            Frame::State(_) => "the state",
            Frame::Compressed(_) => "compressed pages",
            Frame::Rehearsal(_) => "a rehearsal",
        }
    }

    /// Whether it is this message.
    pub(crate) fn is(&self, message: &Message) -> bool {
        matches!(self, Frame::Message(ours) if ours == message)
    }

    /// Reads a frame's content.
    pub(crate) fn decode(kind: FrameKind, content: Vec<u8>) -> Result<Self, ProtocolError> {
        match kind {
            FrameKind::Control => Ok(Frame::Message(read(kind, &content)?)),
            FrameKind::Pages => Ok(Frame::Pages(read::<PageTable>(kind, &content)?.check()?)),
            FrameKind::State => Ok(Frame::State(content)),
            FrameKind::Compressed => Ok(Frame::Compressed(
                read::<CompressedTable>(kind, &content)?.check()?,
            )),
            FrameKind::Rehearsal => Ok(Frame::Rehearsal(content)),
        }
    }
}

impl PageTable {
    /// Bytes of content that follow.
    pub(crate) fn data_bytes(&self) -> u64 {
        self.data.iter().map(|span| span.len).sum()
    }

    /// Bytes of all pages, zero pages included.
    pub(crate) fn page_bytes(&self) -> u64 {
        self.data_bytes() + self.zero.iter().map(|span| span.len).sum::<u64>()
    }

    fn check(self) -> Result<Self, ProtocolError> {
        check_spans(&self.data, MAX_BATCH_BYTES)?;
        check_spans(&self.zero, MAX_BATCH_ZERO_BYTES)?;
        Ok(self)
    }
}

impl CompressedTable {
    /// Bytes of the pages.
    pub(crate) fn page_bytes(&self) -> u64 {
        self.pages.iter().map(|span| span.len).sum()
    }

    fn check(self) -> Result<Self, ProtocolError> {
        check_spans(&self.pages, MAX_BATCH_BYTES)?;
        if self.len == 0 || u64::from(self.len) >= self.page_bytes() {
            return Err(ProtocolError::Batch {
                why: "a compressed block that is empty or as long as its pages",
            });
        }
        Ok(self)
    }
}

/// Checks the ranges of a table, which may have `most` bytes in all.
fn check_spans(spans: &[Span], most: u64) -> Result<(), ProtocolError> {
    let refuse = |why| Err(ProtocolError::Batch { why });
    if spans.len() > MAX_BATCH_RANGES {
        return refuse("more than 256 ranges");
    }
    if !spans.iter().all(Span::is_pages) {
        return refuse("a range that is empty or not made of whole pages");
    }
    let total = spans.iter().fold(0u64, |sum, span| sum.saturating_add(span.len));
    if total > most {
        return refuse("more than 1 MiB of content or 256 MiB of zero pages");
    }
    Ok(())
}

impl Span {
    /// Whether it is made of whole pages, at least one.
    pub(crate) fn is_pages(&self) -> bool {
        self.gpa.is_multiple_of(PAGE_SIZE) && self.len.is_multiple_of(PAGE_SIZE) && self.len > 0
    }
}

impl From<MemoryRange> for Span {
    fn from(range: MemoryRange) -> Self {
        Self {
            gpa: range.gpa,
            len: range.len,
        }
    }
}

impl From<Span> for MemoryRange {
    fn from(span: Span) -> Self {
        Self {
            gpa: span.gpa,
            len: span.len,
        }
    }
}

/// Parses a content, all of which must be the value.
fn read<'a, T: Deserialize<'a>>(kind: FrameKind, content: &'a [u8]) -> Result<T, ProtocolError> {
    let (value, rest) = postcard::take_from_bytes(content).map_err(|source| ProtocolError::Content {
        kind: kind.name(),
        source,
    })?;
    match rest.len() {
        0 => Ok(value),
        count => Err(ProtocolError::Trailing {
            kind: kind.name(),
            count,
        }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::Hello;

    fn content(value: &impl Serialize) -> Vec<u8> {
        postcard::to_stdvec(value).unwrap()
    }

    #[test]
    fn messages_keep_their_place_on_the_wire() {
        let number = |message: &Message| content(message)[0];
        let abort = Message::Abort {
            cancelled: true,
            reason: "x".into(),
        };
        assert_eq!(number(&Message::Hello(Hello::ours())), 0);
        assert_eq!(number(&Message::RoundEnd(1)), 14);
        assert_eq!(
            number(&Message::Go {
                stopped_for_ns: 1,
                round_trip_ns: 2
            }),
            20
        );
        assert_eq!(content(&abort), [24, 1, 1, b'x']);
        assert_eq!(number(&Message::KeepAlive), 25);
        let header = FrameHeader::new(FrameKind::Pages, 0x1234).unwrap();
        assert_eq!(header.encode(), [2, 0, 0, 0, 0x34, 0x12, 0, 0]);
        assert_eq!(FrameHeader::decode(header.encode()).unwrap(), header);
    }

    #[test]
    fn frames_over_their_limit_are_refused() {
        assert!(matches!(
            FrameHeader::decode([1, 0, 0, 0, 1, 0, 16, 0]),
            Err(ProtocolError::TooLong { .. })
        ));
        assert!(matches!(
            FrameHeader::decode([3, 0, 0, 0, 1, 0, 0, 4]),
            Err(ProtocolError::TooLong { .. })
        ));
        assert!(matches!(
            FrameHeader::decode(*b"HTTP/1.1"),
            Err(ProtocolError::FrameHeader { .. })
        ));
        assert!(matches!(
            FrameHeader::decode([1, 1, 0, 0, 0, 0, 0, 0]),
            Err(ProtocolError::FrameHeader { .. })
        ));
        let trailing = Frame::decode(FrameKind::Control, vec![25, 0]);
        assert!(matches!(trailing, Err(ProtocolError::Trailing { count: 1, .. })));
    }

    #[test]
    fn tables_over_their_limits_are_refused() {
        let span = |gpa, len| Span { gpa, len };
        let check = |data: Vec<Span>, zero: Vec<Span>| PageTable { data, zero }.check();
        assert!(check(vec![span(0, 1 << 20)], vec![span(1 << 30, 1 << 28)]).is_ok());
        assert!(check(vec![span(0, 1 << 20), span(1 << 21, 4096)], vec![]).is_err());
        assert!(check(vec![], vec![span(0, (1 << 28) + 4096)]).is_err());
        assert!(check(vec![span(0, 4096); 257], vec![]).is_err());
        for bad in [span(1, 4096), span(0, 1), span(0, 0), span(0, u64::MAX - 4095)] {
            assert!(check(vec![bad, bad], vec![]).is_err());
            assert!(check(vec![], vec![bad, bad]).is_err());
        }
    }

    #[test]
    fn a_full_table_fits_its_frame() {
        let spans = vec![
            Span {
                gpa: u64::MAX - 4095,
                len: 1 << 20
            };
            MAX_BATCH_RANGES
        ];
        let table = PageTable {
            data: spans.clone(),
            zero: spans,
        };
        assert!(FrameHeader::new(FrameKind::Pages, content(&table).len()).is_ok());
    }

    proptest! {
        #[test]
        fn any_content_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            for kind in [
                FrameKind::Control,
                FrameKind::Pages,
                FrameKind::State,
                FrameKind::Compressed,
                FrameKind::Rehearsal,
            ] {
                let _ = Frame::decode(kind, bytes.clone());
            }
        }

        #[test]
        fn any_content_of_a_known_variant_is_read_or_refused(
            variant in 0u8..28,
            bytes in proptest::collection::vec(any::<u8>(), 0..512),
        ) {
            let bytes = [&[variant][..], &bytes].concat();
            let _ = Frame::decode(FrameKind::Control, bytes);
        }

        #[test]
        fn any_header_is_within_its_limit_or_refused(bytes in any::<[u8; 8]>(), kind in 0u8..8) {
            let bytes = [kind, 0, 0, 0, bytes[4], bytes[5], bytes[6], bytes[7]];
            if let Ok(header) = FrameHeader::decode(bytes) {
                prop_assert!(header.len <= header.kind.limit());
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }
}
