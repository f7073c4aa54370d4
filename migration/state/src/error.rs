//! Why saved state cannot be read or written.

/// Why saved state was refused, or could not be written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The bytes do not start like an envelope.
    #[error("this is not saved state: expected the magic {expected:02x?}, got {got:02x?}")]
    Magic {
        /// What an envelope starts with.
        expected: [u8; 8],
        /// What the bytes start with, as far as they go.
        got: Vec<u8>,
    },
    /// The envelope's own layout is of another version.
    #[error("saved state has format version {got}, expected {expected}")]
    Format {
        /// [`crate::FORMAT_VERSION`].
        expected: u16,
        /// What the envelope says.
        got: u16,
    },
    /// The envelope says that it is longer or shorter than the bytes at hand.
    #[error("saved state says it is {expected} bytes long, got {got}")]
    Length {
        /// What the envelope says, in bytes.
        expected: u64,
        /// What came, in bytes.
        got: u64,
    },
    /// The content does not match its checksum.
    #[error("saved state is damaged: expected checksum {expected:016x}, got {got:016x}")]
    Checksum {
        /// What the envelope says.
        expected: u64,
        /// What the content gives.
        got: u64,
    },
    /// The content ends in the middle of something.
    #[error("saved state ends in the middle of {what}")]
    Truncated {
        /// What was being read.
        what: &'static str,
    },
    /// Bytes are left over after the last record.
    #[error("saved state has {count} bytes after its last record")]
    TrailingBytes {
        /// How many.
        count: usize,
    },
    /// Something is larger than the format allows.
    #[error("{what} in saved state: at most {limit} allowed, got {got}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The limit.
        limit: usize,
        /// What came.
        got: usize,
    },
    /// A name is not UTF-8.
    #[error("{what} in saved state is not UTF-8")]
    NotUtf8 {
        /// Which name.
        what: &'static str,
        /// Where it stops being UTF-8.
        #[source]
        source: std::str::Utf8Error,
    },
    /// Two records for one instance and kind.
    #[error("saved state has two records of kind {kind:?} for {instance:?}")]
    Duplicate {
        /// Instance of both.
        instance: String,
        /// Kind of both.
        kind: String,
    },
    /// A record that was asked for is not there.
    #[error("saved state has no record of kind {kind:?} for {instance:?}")]
    Missing {
        /// Instance that was asked for.
        instance: String,
        /// Kind that was asked for.
        kind: &'static str,
    },
    /// Records are left that nothing asked for.
    #[error("saved state has records that nothing here understands: {}", names.join(", "))]
    LeftOver {
        /// `instance (kind vN)` of each.
        names: Vec<String>,
    },
    /// A record's version is one that this program cannot read.
    #[error(
        "record of kind {kind:?} has version {got}, expected {expected} or one that it can be upgraded from"
    )]
    Version {
        /// Kind of the record.
        kind: &'static str,
        /// The version that this program writes.
        expected: u16,
        /// What came.
        got: u16,
    },
    /// A payload is not what its kind and version say.
    #[error("payload of record {kind:?} version {version} cannot be read")]
    Payload {
        /// Kind of the record.
        kind: &'static str,
        /// Its version.
        version: u16,
        /// What the decoder says.
        #[source]
        source: postcard::Error,
    },
    /// A payload is longer than what its kind and version say.
    #[error("payload of record {kind:?} version {version} has {count} bytes too many")]
    PayloadTrailing {
        /// Kind of the record.
        kind: &'static str,
        /// Its version.
        version: u16,
        /// How many.
        count: usize,
    },
    /// A record cannot be written as bytes.
    #[error("record of kind {kind:?} cannot be written")]
    Encode {
        /// Kind of the record.
        kind: &'static str,
        /// What the encoder says.
        #[source]
        source: postcard::Error,
    },
}
