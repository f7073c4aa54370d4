//! The manifest: what a snapshot is, sealed by a checksum.

use std::fmt;
use std::path::Path;

use migration::MachineDescription;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use xxhash_rust::xxh3::xxh3_64;

use super::SnapshotError;
use crate::memory::PAGE_SIZE;

/// The format that this version writes and reads.
pub(super) const FORMAT: u32 = 3;

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of godwit that wrote it.
    pub godwit_version: String,
    /// Its own name, by which differences to it find it.
    pub id: SnapshotId,
    /// What its memory is a difference to; nothing if it has all of it.
    pub difference: Option<DifferenceRecord>,
    /// When the guest came to stand still, in nanoseconds since 1970.
    pub stopped_unix_ns: u64,
    /// The machine, as it is described to a destination.
    pub machine: MachineDescription,
    /// The file with the machine's state.
    pub state: FileRecord,
    /// The file with the checksums of memory.
    pub checksums: FileRecord,
    /// Pages of memory in it that are not zero.
    pub pages: u64,
}

/// What a difference is to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DifferenceRecord {
    /// The snapshot whose memory all other pages have.
    pub base: SnapshotId,
    /// The file that says which pages the difference has.
    pub changed: FileRecord,
}

/// The name of a snapshot, which no other has: 128 random bits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(u128);

impl SnapshotId {
    /// A new one.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        let got = getrandom(&mut bytes, GetRandomFlags::empty())?;
        if got == bytes.len() {
            return Ok(Self(u128::from_le_bytes(bytes)));
        }
        Err(std::io::ErrorKind::UnexpectedEof.into())
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match u128::from_str_radix(&text, 16) {
            Ok(id) if text.len() == 32 => Ok(Self(id)),
            _ => Err(format!("expected 32 hexadecimal digits, got {text:?}")),
        }
    }
}

/// A file that is read as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Its length in bytes.
    pub bytes: u64,
    /// Its xxh3-64, as 16 hexadecimal digits.
    pub xxh3: String,
}

/// The content of the manifest's file. The manifest's text is part of it unchanged, so that the checksum covers every byte
/// of that text.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SealedManifest {
    format: u32,
    xxh3: String,
    manifest: Box<RawValue>,
}

/// What every format begins with.
#[derive(Deserialize)]
struct ManifestHead {
    format: u32,
}

impl FileRecord {
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.len() as u64,
            xxh3: checksum(bytes),
        }
    }

    /// Compares what was read from `path` with what was written.
    pub(super) fn check(&self, bytes: &[u8], path: &Path) -> Result<(), SnapshotError> {
        check_len(path, self.bytes, bytes.len() as u64)?;
        check_sum(&self.xxh3, bytes, path)
    }
}

impl Manifest {
    /// What it is a difference to, if it is one.
    pub fn base(&self) -> Option<&SnapshotId> {
        self.difference.as_ref().map(|difference| &difference.base)
    }

    /// Bytes of memory that are not zero.
    pub fn stored_bytes(&self) -> u64 {
        self.pages.saturating_mul(PAGE_SIZE)
    }

    /// The bytes of the manifest's file.
    pub(super) fn seal(&self) -> Result<Vec<u8>, serde_json::Error> {
        let manifest = serde_json::value::to_raw_value(self)?;
        let mut text = serde_json::to_vec(&SealedManifest {
            format: FORMAT,
            xxh3: checksum(manifest.get().as_bytes()),
            manifest,
        })?;
        text.push(b'\n');
        Ok(text)
    }

    /// Parses the bytes of the file at `path`, which are untrusted, and compares the checksum.
    pub(super) fn unseal(bytes: &[u8], path: &Path) -> Result<Self, SnapshotError> {
        let bad = |source| SnapshotError::Manifest {
            path: path.into(),
            source,
        };
        let ManifestHead { format } = serde_json::from_slice(bytes).map_err(bad)?;
        if format != FORMAT {
            return Err(SnapshotError::Format {
                path: path.into(),
                got: format,
            });
        }
        let sealed: SealedManifest = serde_json::from_slice(bytes).map_err(bad)?;
        let text = sealed.manifest.get();
        check_sum(&sealed.xxh3, text.as_bytes(), path)?;
        serde_json::from_str(text).map_err(bad)
    }
}

fn checksum(bytes: &[u8]) -> String {
    format!("{:016x}", xxh3_64(bytes))
}

/// Compares a file's length with what it is to be.
pub(super) fn check_len(path: &Path, expected: u64, got: u64) -> Result<(), SnapshotError> {
    if expected == got {
        return Ok(());
    }
    Err(SnapshotError::Length {
        path: path.into(),
        expected,
        got,
    })
}

fn check_sum(expected: &str, bytes: &[u8], path: &Path) -> Result<(), SnapshotError> {
    let got = checksum(bytes);
    if expected == got {
        return Ok(());
    }
    Err(SnapshotError::Checksum {
        path: path.into(),
        expected: expected.into(),
        got,
    })
}
