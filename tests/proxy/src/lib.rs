//! A man in the middle of migrations, for tests.
//!
//! A [`Proxy`] stands between a source and a destination, passes every connection on, and reads the frames of
//! `migration/PROTOCOL.md` as they go by. It records which messages passed, as [`FaultPoint`]s, so that a test can
//! take those of a migration without faults and try a [`ProxyFault`] at each of them: a message that is added to the
//! protocol cannot be forgotten.

mod fault;
mod frame;
mod proxy;
mod pump;
mod socket;
#[cfg(test)]
mod tests;

pub use fault::{
    Direction, FaultPlan, FaultPoint, FramePart, NetworkPace, ProxyConnection, ProxyFault, When,
};
pub use proxy::{Proxy, ProxyError};
pub use socket::{Address, AddressError};
