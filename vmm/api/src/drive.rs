//! `PATCH /drives/{id}`, with Firecracker's fields.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Body of `PATCH /drives/{id}`. Whatever it says, the server reads the file's size anew and tells the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// The disk's name.
    pub drive_id: String,
    /// Its file, if the client names it: no other one can be put in its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<PathBuf>,
    /// Limits that are to change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Firecracker's `rate_limiter`, also in the configuration file: what is left out stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Of bytes.
    pub bandwidth: Option<TokenBucket>,
    /// Of requests.
    pub ops: Option<TokenBucket>,
}

/// Firecracker's token bucket. A bucket of size 0 is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens of a full bucket.
    pub size: u64,
    /// Tokens that can be had beyond them, once.
    #[serde(default, deserialize_with = "null_is_zero")]
    pub one_time_burst: u64,
    /// How long it takes to fill an empty bucket, in milliseconds.
    pub refill_time: u64,
}

/// Firecracker takes `null` for a field that is left out.
fn null_is_zero<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
