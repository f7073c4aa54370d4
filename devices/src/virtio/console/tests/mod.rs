//! The device, from both of its ends.

mod flow;
mod fuzz;
mod hostile;
mod messages;
mod moves;
mod rig;
