//! What goes over the wire, as `PROTOCOL.md` describes it: frames, messages and their limits. Everything from a peer is
//! checked here as far as that is possible without a machine.

mod frame;
mod message;

pub(crate) use frame::{
    CompressedTable, Frame, FrameHeader, FrameKind, HEADER_LEN, MAX_BATCH_BYTES, MAX_BATCH_RANGES, PageTable,
    Span,
};
pub(crate) use message::{AttemptOutcome, Features, Hello, MAX_SPANS, MemoryTransfer, Message, Token};

/// Why bytes from the peer are not what the protocol allows.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// A frame of no known kind: the peer is another program, or one of the two has lost its place in the stream.
    #[error("expected a frame of kind 1 to 5, got header {got:02x?}")]
    FrameHeader {
        /// The header.
        got: [u8; 8],
    },
    /// A frame is longer than its kind may be.
    #[error("a frame of kind {kind} has at most {limit} bytes, got {got}")]
    TooLong {
        /// The kind.
        kind: &'static str,
        /// The limit, in bytes.
        limit: u32,
        /// The length in the header, in bytes.
        got: u32,
    },
    /// A frame's content cannot be read.
    #[error("a frame of kind {kind} cannot be read")]
    Content {
        /// The kind.
        kind: &'static str,
        /// The decoder's error.
        #[source]
        source: postcard::Error,
    },
    /// A frame has bytes after its content.
    #[error("a frame of kind {kind} has {count} bytes too many")]
    Trailing {
        /// The kind.
        kind: &'static str,
        /// How many.
        count: usize,
    },
    /// A table of pages is larger than a batch may be, or names something that is not whole pages.
    #[error("a batch of pages is not allowed: {why}")]
    Batch {
        /// What is wrong.
        why: &'static str,
    },
}

/// A duration in nanoseconds, the unit of messages; 64 bits hold 584 years.
pub(crate) fn nanoseconds(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
