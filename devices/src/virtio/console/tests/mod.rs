//! The device, from both of its ends.

mod flow;
mod hostile;
mod messages;
mod moves;
mod rig;
