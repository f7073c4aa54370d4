//! Saved state: what a machine is made of besides its memory, as a list of typed, versioned records.
//!
//! A [`Record`] is plain data with a kind and a version; an [`Envelope`] carries records from one process to
//! another and refuses whatever it does not recognise. See `DESIGN.md` beside this crate's `Cargo.toml`.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod codec;
mod envelope;
mod error;
mod golden;
mod record;

#[cfg(test)]
mod tests;

pub use codec::{FORMAT_VERSION, MAX_ENCODED_LEN, MAX_NAME_LEN, MAX_PAYLOAD_LEN, MAX_RECORDS};
pub use envelope::Envelope;
pub use error::StateError;
pub use golden::assert_golden;
pub use record::Record;
