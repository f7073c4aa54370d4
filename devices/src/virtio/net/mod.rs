//! The network device (virtio 1.2, 5.1) on a tap of the host.

mod announce;
mod control;
mod device;
mod mac;
mod metrics;
mod offloads;
mod parameters;
mod receive;
mod serve;
mod state;
mod sys;
mod tap;
mod transmit;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use device::VirtioNet;
pub use mac::{MacAddress, MacError};
pub use metrics::NetMetrics;
pub use parameters::{MAX_QUEUE_PAIRS, NetParameters, NetParametersError};
pub use state::NetState;
pub use tap::{Tap, TapError, TapSource};

/// Bytes of the header before each packet (virtio 1.2, 5.1.6), for the guest as for the tap.
const HEADER_LEN: usize = 12;
/// Bytes of an Ethernet header.
const ETHERNET_LEN: usize = 14;
