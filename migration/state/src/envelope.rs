//! Records together with a length and a checksum, as they travel or lie in a file.

use std::collections::HashSet;

use crate::codec::{self, MAX_ENCODED_LEN, MAX_NAME_LEN, MAX_PAYLOAD_LEN, MAX_RECORDS, check_limit};
use crate::{Record, StateError, record};

/// A list of records, each for one instance (a device's id, `vcpu0`, …) and of one kind.
///
/// Reading goes by [`Envelope::take`]; [`Envelope::finish`] then proves that nothing was left unread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Envelope {
    entries: Vec<EnvelopeEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EnvelopeEntry {
    pub(crate) instance: String,
    pub(crate) kind: String,
    pub(crate) version: u16,
    pub(crate) payload: Vec<u8>,
}

impl Envelope {
    /// An envelope without records.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a record. Names, payload and the whole are held to the format's limits, and an instance has at
    /// most one record of a kind.
    pub fn put<R: Record>(&mut self, instance: &str, record: &R) -> Result<(), StateError> {
        check_limit("bytes of an instance name", MAX_NAME_LEN, instance.len())?;
        check_limit("bytes of a kind", MAX_NAME_LEN, R::KIND.len())?;
        check_limit("records", MAX_RECORDS, self.entries.len() + 1)?;
        if self.position(instance, R::KIND).is_some() {
            return Err(StateError::Duplicate {
                instance: instance.to_owned(),
                kind: R::KIND.to_owned(),
            });
        }
        let payload = record::encode(record)?;
        check_limit("bytes of a payload", MAX_PAYLOAD_LEN, payload.len())?;
        let entry = EnvelopeEntry {
            instance: instance.to_owned(),
            kind: R::KIND.to_owned(),
            version: R::VERSION,
            payload,
        };
        let others: usize = self.entries.iter().map(codec::entry_len).sum();
        let total = codec::EMPTY_LEN + others + codec::entry_len(&entry);
        check_limit("bytes", MAX_ENCODED_LEN, total)?;
        self.entries.push(entry);
        Ok(())
    }

    /// Takes a record out.
    pub fn take<R: Record>(&mut self, instance: &str) -> Result<R, StateError> {
        let Some(at) = self.position(instance, R::KIND) else {
            return Err(StateError::Missing {
                instance: instance.to_owned(),
                kind: R::KIND,
            });
        };
        let entry = self.entries.remove(at);
        record::decode(entry.version, &entry.payload)
    }

    /// Whether there is a record of a kind for an instance.
    pub fn has<R: Record>(&self, instance: &str) -> bool {
        self.position(instance, R::KIND).is_some()
    }

    /// Proves that every record was taken.
    pub fn finish(self) -> Result<(), StateError> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let name = |entry: &EnvelopeEntry| format!("{} ({} v{})", entry.instance, entry.kind, entry.version);
        Err(StateError::LeftOver {
            names: self.entries.iter().map(name).collect(),
        })
    }

    /// The envelope as bytes, with length and checksum.
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(&self.entries)
    }

    /// An envelope from untrusted bytes. The records' payloads are looked at only by [`Envelope::take`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let entries = codec::decode(bytes)?;
        let mut seen = HashSet::new();
        for entry in &entries {
            if !seen.insert((&entry.instance, &entry.kind)) {
                let (instance, kind) = (entry.instance.clone(), entry.kind.clone());
                return Err(StateError::Duplicate { instance, kind });
            }
        }
        Ok(Self { entries })
    }

    fn position(&self, instance: &str, kind: &str) -> Option<usize> {
        self.entries
            .iter()
            .position(|entry| entry.instance == instance && entry.kind == kind)
    }
}
