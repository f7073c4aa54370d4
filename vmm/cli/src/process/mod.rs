//! What a process that becomes a VM does about itself: its terminal and input, signals, limits, and its end when guest
//! memory is lost.

pub(crate) mod lost_memory;
pub(crate) mod resources;
pub(crate) mod signals;
pub(crate) mod stdin;
pub(crate) mod terminal;
