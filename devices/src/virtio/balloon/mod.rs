//! The memory balloon (virtio 1.2, 5.5): memory that the guest can do without goes back to the host.
//!
//! In two ways: the host sets a target and the guest gives up that much until the target changes; and the guest reports
//! by itself the pages that it does not use at the moment. Pages that were given up are neither kept nor migrated.
//!
//! The host can also ask which pages the guest does not use at the moment ([`BalloonControl::hints`]); these are not
//! given up, but need not be migrated.

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
