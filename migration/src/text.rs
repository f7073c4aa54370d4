//! Errors as one line of text.

use std::error::Error;
use std::fmt::Write;

use crate::ports::Difference;

/// Most characters of a text that came from a peer.
const MAX_PEER_TEXT: usize = 1024;

/// Most differences that are written out.
const MAX_DIFFERENCES: usize = 32;

/// An error and its causes, on one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

/// A peer's text, safe to print: cut to a bound, without control characters that a terminal would obey.
pub(crate) fn clean(text: &str) -> String {
    let printable = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(MAX_PEER_TEXT).map(printable).collect()
}

/// Differences, each with what was expected and what came, on one line.
pub fn list(differences: &[Difference]) -> String {
    let one = |Difference { what, expected, got }: &Difference| {
        format!(
            "{}: expected {}, got {}",
            clean(what),
            clean(expected),
            clean(got)
        )
    };
    let mut text = differences
        .iter()
        .take(MAX_DIFFERENCES)
        .map(one)
        .collect::<Vec<_>>()
        .join("; ");
    if let Some(more @ 1..) = differences.len().checked_sub(MAX_DIFFERENCES) {
        let _ = write!(text, "; and {more} more");
    }
    text
}

/// A panic's message.
pub(crate) fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    clean(&threads::panic_message(payload))
}
