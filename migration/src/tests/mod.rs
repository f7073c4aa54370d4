//! The engine from end to end, over real sockets, with machines made of memory and a thread.

mod cuts;
mod destination;
mod destination_commit;
mod destination_hand;
mod disk;
mod fake;
mod faults;
mod fuzz;
mod guest;
mod link;
mod matrix;
mod mirror;
mod moves;
mod pause;
mod peers;
mod rig;
mod unused;
