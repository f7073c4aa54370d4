//! What the guests decide without a machine: which pages they own, what these hold, when the next is due, what
//! the bare guest's command line says. No std, so that the bare guest can use it; tested on the host.

#![cfg_attr(not(test), no_std)]

mod memory;
mod pace;
mod random;
mod settings;
mod stamp;

pub use memory::{PAGE, Share, UsableRanges};
pub use pace::DirtyPace;
pub use random::Random;
pub use settings::{BareSettings, WorkloadRate, size, virtio_devices};
pub use stamp::{STAMP_WORDS, Seen, WORDS, body_intact, check, fill_body, stamp};
