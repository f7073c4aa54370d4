//! How other processes know a VM: its name, and the HTTP API on its Unix socket, as types and as a client. The API has
//! Firecracker's routes for what Firecracker has, and migration.
//!
//! | route | meaning |
//! |---|---|
//! | `GET /` | [`InstanceInfo`] |
//! | `GET /version` | [`Version`] |
//! | `PATCH /vm` | [`VmUpdate`]: pause, resume |
//! | `PUT /actions` | [`Action`]: power button, stop |
//! | `PUT /migration` | [`MigrationRequest`]; the response is a stream of [`MigrationEvent`] lines |
//! | `GET /migration` | the live `Progress`, 404 if there is none |
//! | `DELETE /migration` | cancels |
//! | `PUT /migration/resolve` | [`ResolveRequest`]; the response is a [`Resolution`] |
//! | `PUT /snapshot` | [`SnapshotRequest`]; the response, when it is complete, is a [`SnapshotReport`] |
//! | `DELETE /snapshot` | cancels, as `DELETE /migration` does |
//! | `PATCH /balloon` | [`BalloonUpdate`]: how much memory the guest is to give up |
//! | `GET /balloon/statistics` | [`BalloonStatistics`]; 404 if there is no balloon |
//! | `GET /metrics` | [`Metrics`]: what the devices count |
//! | `PATCH /drives/{id}` | [`DriveUpdate`]: read the disk's size anew, change its limits |
//! | `GET /console` | `Upgrade: console`; then the console's bytes, both ways |
//! | `PUT /console/size` | [`ConsoleSize`]: that of the terminal that shows it |
//!
//! An error is a [`Fault`] with status 400, 404, 405 or 409. Bodies are JSON, whatever their `Content-Type` says.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod balloon;
mod drive;
mod metrics;
mod migrate;
mod snapshot;
mod types;

pub mod client;
pub mod rundir;

pub use balloon::{BalloonStatistics, BalloonUpdate, GuestMemoryStatistics};
pub use drive::{DriveUpdate, RateLimiter, TokenBucket};
pub use metrics::Metrics;
pub use migrate::{MigrationEvent, MigrationRequest, RequestError, Resolution, ResolveRequest, Resolved};
pub use snapshot::{SnapshotProgress, SnapshotReport, SnapshotRequest};
pub use types::{
    Action, ActionType, ConsoleSize, Fault, InstanceInfo, InstanceState, Version, VmState, VmUpdate,
};

/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The protocol that `GET /console` upgrades to.
pub const CONSOLE_PROTOCOL: &str = "console";
