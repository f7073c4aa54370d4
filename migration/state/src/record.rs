//! What a kind of saved state says about itself, and how older versions of it are read.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::StateError;

/// One kind of saved state: plain data, apart from the live object that it is taken from.
///
/// A restored record is untrusted: it becomes live only through a checked conversion of the owner's.
///
/// A change to the fields of a released record raises [`Record::VERSION`] and adds the old layout to
/// [`Record::upgrade`].
pub trait Record: Serialize + DeserializeOwned {
    /// Name of the kind, e.g. `virtio-block`; at most 64 bytes.
    const KIND: &'static str;
    /// The version that this program writes.
    const VERSION: u16;

    /// Reads a payload of another version than [`Record::VERSION`]. A kind that has only ever had one version
    /// leaves this as it is: refused with [`StateError::Version`].
    fn upgrade(version: u16, payload: &[u8]) -> Result<Self, StateError> {
        let _ = payload;
        Err(StateError::Version {
            kind: Self::KIND,
            expected: Self::VERSION,
            got: version,
        })
    }
}

/// The payload of a record, in the version that this program writes.
pub(crate) fn encode<R: Record>(record: &R) -> Result<Vec<u8>, StateError> {
    postcard::to_stdvec(record).map_err(|source| StateError::Encode {
        kind: R::KIND,
        source,
    })
}

/// A record from a payload of any version.
pub(crate) fn decode<R: Record>(version: u16, payload: &[u8]) -> Result<R, StateError> {
    if version != R::VERSION {
        return R::upgrade(version, payload);
    }
    let (record, rest) = postcard::take_from_bytes(payload).map_err(|source| StateError::Payload {
        kind: R::KIND,
        version,
        source,
    })?;
    if rest.is_empty() {
        Ok(record)
    } else {
        Err(StateError::PayloadTrailing {
            kind: R::KIND,
            version,
            count: rest.len(),
        })
    }
}
