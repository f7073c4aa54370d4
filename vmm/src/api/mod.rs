//! The HTTP API of one VM on its Unix socket: Firecracker's routes for what Firecracker has, and migration.
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
//! | `PATCH /drives/{id}` | [`DriveUpdate`]: look at the disk's size anew, change its limits |
//! | `GET /console` | `Upgrade: console`; then the console's bytes, both ways |
//! | `PUT /console/size` | `Size`: that of the terminal on which somebody looks at it |
//!
//! An error is a [`Fault`] with status 400, 404, 405 or 409. Bodies are JSON, whatever their `Content-Type` says.

mod balloon;
mod drive;
mod metrics;
mod migrate;
mod routes;
mod server;
mod snapshot;
mod types;

pub mod client;

pub use balloon::{BalloonStatistics, BalloonUpdate};
pub use drive::DriveUpdate;
pub use metrics::Metrics;
pub use migrate::{MigrationEvent, MigrationRequest, RequestError, Resolution, ResolveRequest, Verdict};
pub use server::ApiServer;
pub use snapshot::{SnapshotReport, SnapshotRequest};
pub use types::{Action, ActionType, Fault, InstanceInfo, InstanceState, Version, VmState, VmUpdate};
