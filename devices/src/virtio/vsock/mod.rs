//! The socket device (virtio 1.2, 5.10): streams between programs in the guest and programs on the host.
//!
//! On the host every stream is a Unix socket. A program that connects to the device's own socket says `CONNECT
//! <port>\n`, is answered `OK <its own port>\n`, and has a stream to the guest's program that listens on that port. A
//! guest that connects to port P of the host (CID 2) is connected to the program that listens on the socket `<path>_P`.
//!
//! Streams end when the machine moves: the guest gets a transport reset, and its listeners stay.

mod backend;
mod connection;
mod connections;
mod device;
mod greeting;
mod metrics;
mod packet;
mod parameters;
mod state;

#[cfg(test)]
mod tests;

pub use backend::VsockBackend;
pub use device::VirtioVsock;
pub use metrics::VsockMetrics;
pub use parameters::{CID_MAX, CID_MIN, VsockParameters};
pub use state::VsockState;
