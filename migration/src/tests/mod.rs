//! The engine from end to end, over real sockets, with machines made of memory and a thread.

mod cuts;
mod fake;
mod faults;
mod guest;
mod matrix;
mod moves;
mod peers;
mod rig;
