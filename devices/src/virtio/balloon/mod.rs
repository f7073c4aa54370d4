//! The memory balloon (virtio 1.2, 5.5): memory that the guest can do without goes back to the host.
//!
//! Two ways: the host sets a target and the guest gives up that much until it is asked to take it back; and the guest
//! reports, by itself, what it does not use at the moment. What was given up is neither kept nor migrated, except where
//! memory is mapped from a file: there it is again what the file has.
//!
//! And the host can ask what the guest does not use at the moment ([`BalloonControl::hints`]); that is not given up, but need
//! not be migrated.

mod control;
mod device;
mod discard;
mod discarder;
mod hints;
mod metrics;
mod replaced;
mod state;
mod statistics;

#[cfg(test)]
mod tests;

pub use control::BalloonControl;
pub use device::VirtioBalloon;
pub use metrics::BalloonMetrics;
pub use state::BalloonState;
pub use statistics::Statistics;

/// The unit of target and size on the wire, in bytes.
pub const PAGE_SIZE: u64 = 4096;
