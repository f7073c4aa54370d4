//! Compares a record with the bytes that a released version wrote.

use std::fmt::Debug;

use crate::Record;
use crate::record::{decode, encode};

/// Asserts, in a test, that a golden payload (hexadecimal, white space allowed) of `version` still reads as
/// `expected`, and, where `version` is the current one, that `expected` is still written as that payload.
///
/// # Panics
///
/// When one of the two does not hold; the message shows the payload as it would be written now.
pub fn assert_golden<R: Record + PartialEq + Debug>(version: u16, golden: &str, expected: &R) {
    let golden: String = golden.chars().filter(|c| !c.is_whitespace()).collect();
    let current = encode(expected).map(|bytes| to_hex(&bytes));
    let read = from_hex(&golden).map(|bytes| decode::<R>(version, &bytes));
    assert!(
        matches!(&read, Some(Ok(record)) if record == expected),
        "golden {} v{version} reads as {read:?}, expected {expected:?}; written now: {current:?}",
        R::KIND,
    );
    if version == R::VERSION {
        assert!(
            matches!(&current, Ok(hex) if *hex == golden),
            "{} v{version} is written as {current:?}, expected {golden}",
            R::KIND,
        );
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(hex: &str) -> Option<Vec<u8>> {
    if !hex.is_ascii() || !hex.len().is_multiple_of(2) {
        return None;
    }
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).ok())
        .collect()
}
