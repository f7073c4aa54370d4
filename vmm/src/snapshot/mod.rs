//! A machine in files: what `godwit snapshot` leaves and `godwit restore` starts from.
//!
//! | file | content |
//! |---|---|
//! | `manifest.json` | format, what the machine is, lengths and checksums of the small files; sealed by a checksum |
//! | `state` | the machine's saved state, the same envelope as in a migration |
//! | `memory` | guest RAM, region after region; pages of zeroes are holes |
//! | `checksums` | an xxh3-64 for each [`blocks::BLOCK`] of `memory`, little endian |
//! | `changed` | in a difference only: the runs of pages that `memory` is about, as pairs of first byte and length |
//!
//! A difference has only the pages that may differ from those of its base, another snapshot, which it names. It is
//! made whole by [`merge()`] before a machine can start from it.
//!
//! The directory appears under its name when all of it is on the disk, and never before: it is written under
//! another name beside it ([`SnapshotDraft`]), synchronised and renamed. Everything in it is untrusted when it is read
//! ([`Snapshot`]): all its files are opened before any of them is read, and none through a link.

mod addresses;
mod blocks;
mod directory;
mod draft;
mod error;
mod live;
mod load;
mod manifest;
mod merge;
mod prefetch;
mod queue;
#[cfg(test)]
mod tests;
mod watch;

pub use draft::{SavedMachine, SnapshotContent, SnapshotDraft};
pub use error::SnapshotError;
pub use live::LiveCopy;
pub use load::{Snapshot, SnapshotDifference};
pub use manifest::{Manifest, SnapshotId};
pub use merge::merge;
pub use prefetch::Prefetch;
pub use watch::SnapshotWatch;

// The names of the files in the directory.
const MANIFEST: &str = "manifest.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";
const CHECKSUMS: &str = "checksums";
const CHANGED: &str = "changed";
