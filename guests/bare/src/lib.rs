//! What the bare guest decides, without the machine: its settings, which pages it owns, what they hold, when
//! the next is due. Everything here is tested on the host.

#![cfg_attr(not(test), no_std)]

mod memory;
mod pace;
mod settings;
mod stamp;

pub use memory::{PAGE, Ranges, Share};
pub use pace::Pace;
pub use settings::{Rate, Settings};
pub use stamp::{STAMP_WORDS, Seen, WORDS, body_intact, check, fill_body, stamp};
