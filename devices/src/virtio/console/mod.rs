//! The console device (virtio 1.2, 5.3): a console, and named channels between programs in the guest and on the host.
//!
//! Port 0 is a console (`hvc0` in Linux): what the guest prints goes to the output of its [`ConsoleTerminal`], and the
//! guest never waits for a reader. Every further port has a name (`/dev/virtio-ports/NAME`) and a Unix socket on the
//! host, where one program at a time is the guest's other side: what the program does not read stays in the guest's
//! queue, and what the guest has no buffer for stays in the socket.
//!
//! A device without named ports has two queues and reports its terminal's size in the configuration space; one with
//! ports offers VIRTIO_CONSOLE_F_MULTIPORT and reports it by control messages.

mod backend;
mod control;
mod device;
mod metrics;
mod parameters;
mod port;
mod state;
mod terminal;

#[cfg(test)]
mod tests;

pub use backend::{ConsoleBackend, ConsoleBackendError};
pub use device::VirtioConsole;
pub use metrics::ConsoleMetrics;
pub use parameters::{ConsoleParameters, ConsoleParametersError, PORT_NAME_MAX, PORTS_MAX};
pub use state::{ConsoleState, PortState};
pub use terminal::{ConsoleTerminal, INPUT_LIMIT, TerminalSize};
