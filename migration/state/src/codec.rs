//! The envelope's layout. All integers are little-endian.
//!
//! ```text
//! magic[8] | format u16 | length u64 of everything | count u32 | record… | xxh3-64 of all before it
//! record:  instance length u8, instance | kind length u8, kind | version u16 | payload length u32, payload
//! ```

use xxhash_rust::xxh3::xxh3_64;

use crate::StateError;
use crate::envelope::EnvelopeEntry;

/// Version of the envelope's own layout.
pub const FORMAT_VERSION: u16 = 1;
/// Most bytes of an instance's or a kind's name.
pub const MAX_NAME_LEN: usize = 64;
/// Most bytes of one payload.
pub const MAX_PAYLOAD_LEN: usize = 16 << 20;
/// Most records in an envelope.
pub const MAX_RECORDS: usize = 4096;
/// Most bytes of an encoded envelope.
pub const MAX_ENCODED_LEN: usize = 64 << 20;

/// Bytes of an encoded envelope without records.
pub(crate) const EMPTY_LEN: usize = HEADER_LEN + CHECKSUM_LEN;

const MAGIC: [u8; 8] = *b"GODWITST";
const HEADER_LEN: usize = 8 + 2 + 8 + 4;
const CHECKSUM_LEN: usize = 8;

/// Bytes that one record takes in an encoded envelope.
pub(crate) fn entry_len(entry: &EnvelopeEntry) -> usize {
    1 + entry.instance.len() + 1 + entry.kind.len() + 2 + 4 + entry.payload.len()
}

/// Writes records whose sizes are known to be within the limits.
pub(crate) fn encode(entries: &[EnvelopeEntry]) -> Vec<u8> {
    let len = EMPTY_LEN + entries.iter().map(entry_len).sum::<usize>();
    let mut out = Vec::with_capacity(len);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    out.extend_from_slice(&(len as u64).to_le_bytes());
    out.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    for entry in entries {
        out.push(entry.instance.len() as u8);
        out.extend_from_slice(entry.instance.as_bytes());
        out.push(entry.kind.len() as u8);
        out.extend_from_slice(entry.kind.as_bytes());
        out.extend_from_slice(&entry.version.to_le_bytes());
        out.extend_from_slice(&(entry.payload.len() as u32).to_le_bytes());
        out.extend_from_slice(&entry.payload);
    }
    let checksum = xxh3_64(&out);
    out.extend_from_slice(&checksum.to_le_bytes());
    out
}

/// Reads records from untrusted bytes.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<EnvelopeEntry>, StateError> {
    if bytes.len() > MAX_ENCODED_LEN {
        return Err(StateError::TooLarge {
            what: "bytes",
            limit: MAX_ENCODED_LEN,
            got: bytes.len(),
        });
    }
    let mut reader = RecordReader {
        rest: checked_content(bytes)?,
    };
    let count = u32::from_le_bytes(reader.array("the record count")?) as usize;
    if count > MAX_RECORDS {
        return Err(StateError::TooLarge {
            what: "records",
            limit: MAX_RECORDS,
            got: count,
        });
    }
    let entries = (0..count)
        .map(|_| reader.entry())
        .collect::<Result<Vec<_>, _>>()?;
    match reader.rest.len() {
        0 => Ok(entries),
        count => Err(StateError::TrailingBytes { count }),
    }
}

/// What lies between the length and the checksum, both of which it has verified.
fn checked_content(bytes: &[u8]) -> Result<&[u8], StateError> {
    let mut reader = RecordReader { rest: bytes };
    if !bytes.starts_with(&MAGIC) {
        let got = bytes[..bytes.len().min(MAGIC.len())].to_vec();
        return Err(StateError::Magic { expected: MAGIC, got });
    }
    reader.take(MAGIC.len(), "the magic")?;
    let format = u16::from_le_bytes(reader.array("the format version")?);
    if format != FORMAT_VERSION {
        return Err(StateError::Format {
            expected: FORMAT_VERSION,
            got: format,
        });
    }
    let expected = u64::from_le_bytes(reader.array("the length")?);
    if expected != bytes.len() as u64 {
        return Err(StateError::Length {
            expected,
            got: bytes.len() as u64,
        });
    }
    let Some(content_len) = reader.rest.len().checked_sub(CHECKSUM_LEN) else {
        return Err(StateError::Truncated { what: "the checksum" });
    };
    let content = reader.take(content_len, "the records")?;
    let expected = u64::from_le_bytes(reader.array("the checksum")?);
    let got = xxh3_64(&bytes[..bytes.len() - CHECKSUM_LEN]);
    if expected != got {
        return Err(StateError::Checksum { expected, got });
    }
    Ok(content)
}

struct RecordReader<'a> {
    rest: &'a [u8],
}

impl<'a> RecordReader<'a> {
    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], StateError> {
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(StateError::Truncated { what })?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], StateError> {
        let (head, rest) = self
            .rest
            .split_first_chunk()
            .ok_or(StateError::Truncated { what })?;
        self.rest = rest;
        Ok(*head)
    }

    fn name(&mut self, what: &'static str) -> Result<String, StateError> {
        let [len] = self.array(what)?;
        check_limit(what, MAX_NAME_LEN, usize::from(len))?;
        let bytes = self.take(usize::from(len), what)?;
        let name = std::str::from_utf8(bytes).map_err(|source| StateError::NotUtf8 { what, source })?;
        Ok(name.to_owned())
    }

    fn entry(&mut self) -> Result<EnvelopeEntry, StateError> {
        let instance = self.name("an instance name")?;
        let kind = self.name("a kind")?;
        let version = u16::from_le_bytes(self.array("a record's version")?);
        let len = u32::from_le_bytes(self.array("a payload's length")?) as usize;
        check_limit("bytes of a payload", MAX_PAYLOAD_LEN, len)?;
        let payload = self.take(len, "a payload")?.to_vec();
        Ok(EnvelopeEntry {
            instance,
            kind,
            version,
            payload,
        })
    }
}

/// Refuses what is over a limit.
pub(crate) fn check_limit(what: &'static str, limit: usize, got: usize) -> Result<(), StateError> {
    if got > limit {
        Err(StateError::TooLarge { what, limit, got })
    } else {
        Ok(())
    }
}
