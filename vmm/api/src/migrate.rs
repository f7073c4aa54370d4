//! A client's request for a migration, and the answers to it.

use std::path::PathBuf;
use std::time::Duration;

use migration::{
    Compression, Decision, Endpoint, EndpointError, MAX_STREAMS, MigrateOptions, OnMiss, Progress, Report,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Body of `PUT /migration`. Rates are in bytes per second; what is left out has the default of
/// [`MigrateOptions`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationRequest {
    /// `tcp:ADDRESS:PORT[,ADDRESS:PORT]...` or `unix:PATH`. Names are for the client to look up.
    pub destination: String,
    /// Budget of the downtime in milliseconds.
    #[serde(default = "default_max_downtime_ms")]
    pub max_downtime_ms: f64,
    /// When it must have ended, in milliseconds from its start.
    #[serde(default)]
    pub deadline_ms: Option<f64>,
    /// What to do when the budget or the deadline cannot be kept.
    #[serde(default)]
    pub on_miss: OnMiss,
    /// Data streams.
    #[serde(default = "default_streams")]
    pub streams: u32,
    /// Most bytes per second while the guest runs.
    #[serde(default)]
    pub bandwidth_bytes_per_s: Option<u64>,
    /// Most bytes per second while it is paused.
    #[serde(default)]
    pub final_bandwidth_bytes_per_s: Option<u64>,
    /// Whether vCPUs may be slowed down.
    #[serde(default = "default_throttle")]
    pub throttle: bool,
    /// How page content is compressed, if at all.
    #[serde(default)]
    pub compression: Option<Compression>,
    /// Compare digests of all memory, and of disks that come along.
    #[serde(default)]
    pub verify: bool,
    /// Whether disks that the destination does not have come along.
    #[serde(default)]
    pub with_disks: bool,
}

/// A request that cannot be meant.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum RequestError {
    #[error("destination: {0}")]
    Destination(#[from] EndpointError),
    #[error("{field}: expected milliseconds above 0, got {got}")]
    Duration { field: &'static str, got: f64 },
    #[error("streams: expected 1 to {MAX_STREAMS}, got {0}")]
    Streams(u32),
    #[error("path: expected an absolute path, got {0}")]
    RelativePath(PathBuf),
    #[error("live: expected it with keep_running, and not with diff")]
    Live,
    #[error("{field}: expected more than 0 bytes per second; leave it out for no limit")]
    Rate { field: &'static str },
}

impl MigrationRequest {
    /// A move to `destination` with every default.
    pub fn to(destination: &Endpoint) -> Self {
        Self {
            destination: destination.to_string(),
            max_downtime_ms: default_max_downtime_ms(),
            deadline_ms: None,
            on_miss: OnMiss::default(),
            streams: default_streams(),
            bandwidth_bytes_per_s: None,
            final_bandwidth_bytes_per_s: None,
            throttle: default_throttle(),
            compression: None,
            verify: false,
            with_disks: false,
        }
    }

    /// What the engine is to do.
    pub fn check(&self) -> Result<(Endpoint, MigrateOptions), RequestError> {
        if !(1..=MAX_STREAMS).contains(&self.streams) {
            return Err(RequestError::Streams(self.streams));
        }
        let rate = |field, rate| match rate {
            Some(0) => Err(RequestError::Rate { field }),
            rate => Ok(rate),
        };
        let options = MigrateOptions {
            max_downtime: duration("max_downtime_ms", self.max_downtime_ms)?,
            deadline: self
                .deadline_ms
                .map(|ms| duration("deadline_ms", ms))
                .transpose()?,
            on_miss: self.on_miss,
            streams: self.streams,
            bandwidth: rate("bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)?,
            final_bandwidth: rate("final_bandwidth_bytes_per_s", self.final_bandwidth_bytes_per_s)?,
            throttle: self.throttle,
            compression: self.compression,
            verify: self.verify,
            with_disks: self.with_disks,
            ..MigrateOptions::default()
        };
        Ok((self.destination.parse()?, options))
    }
}

fn duration(field: &'static str, ms: f64) -> Result<Duration, RequestError> {
    let bad = RequestError::Duration { field, got: ms };
    match Duration::try_from_secs_f64(ms / 1e3) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err(bad),
    }
}

fn default_max_downtime_ms() -> f64 {
    MigrateOptions::default().max_downtime.as_secs_f64() * 1e3
}

fn default_streams() -> u32 {
    MigrateOptions::default().streams
}

fn default_throttle() -> bool {
    MigrateOptions::default().throttle
}

/// One line of the response to `PUT /migration`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MigrationEvent {
    /// Where it is; several a second.
    Progress(Progress),
    /// The samples of its trace since the last line of this kind, in order; never empty. None is left out.
    Samples(Vec<Progress>),
    /// How it ended; the last line.
    Report(Box<Report>),
}

/// Body of `PUT /migration/resolve`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// What to do where the other side cannot be asked; nothing by default.
    #[serde(default)]
    pub decision: Option<Decision>,
}

/// What became of a migration in doubt: the answer to `PUT /migration/resolve`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolution {
    /// What holds from now on.
    pub verdict: Resolved,
    /// Whether that is what was asked for; true where nothing particular was.
    pub as_asked: bool,
    /// One line: what is known, and what to do if that is not enough.
    pub message: String,
}

/// Where the guest is after an attempt to resolve a migration in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resolved {
    /// It runs at the other end; this process ends.
    Moved,
    /// It is this process that has it now.
    Here,
    /// The copy that was here is gone.
    Discarded,
    /// Not known: it stays paused here.
    InDoubt,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(more: &str) -> Result<(Endpoint, MigrateOptions), String> {
        let text = format!(r#"{{"destination":"tcp:10.0.0.1:7000"{more}}}"#);
        let request: MigrationRequest = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        request.check().map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_left_out_has_the_engines_default() {
        let (destination, options) = request("").unwrap();
        assert_eq!(destination.to_string(), "tcp:10.0.0.1:7000");
        assert_eq!(options, MigrateOptions::default());
        assert_eq!(
            MigrationRequest::to(&destination).check().unwrap().1,
            MigrateOptions::default()
        );
    }

    #[test]
    fn names_are_left_to_the_client() {
        let request = MigrationRequest {
            destination: "tcp:host-b:7000".into(),
            ..MigrationRequest::to(&"unix:x".parse().unwrap())
        };
        let error = request.check().unwrap_err().to_string();
        assert!(
            error.contains("names a host") && error.contains("godwit migrate"),
            "{error}"
        );
        let several = MigrationRequest {
            destination: "tcp:[2001:db8::1]:7000,10.0.0.1:7000".into(),
            ..request
        };
        let (Endpoint::Tcp(addresses), _) = several.check().unwrap() else {
            panic!("TCP only")
        };
        assert_eq!(addresses.len(), 2);
    }

    #[test]
    fn everything_can_be_asked_for() {
        let (_, options) = request(
            r#","max_downtime_ms":20.5,"deadline_ms":30000,"on_miss":"switch","streams":32,"verify":true,"with_disks":true,
            "bandwidth_bytes_per_s":1000,"final_bandwidth_bytes_per_s":2000,"throttle":false,"compression":"zstd""#,
        )
        .unwrap();
        let expected = MigrateOptions {
            max_downtime: Duration::from_micros(20_500),
            deadline: Some(Duration::from_secs(30)),
            on_miss: OnMiss::Switch,
            streams: 32,
            bandwidth: Some(1000),
            final_bandwidth: Some(2000),
            throttle: false,
            verify: true,
            with_disks: true,
            compression: Some(Compression::Zstd),
            ..MigrateOptions::default()
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for (more, expected) in [
            (r#","streams":0"#, "streams: expected 1 to 32, got 0"),
            (r#","streams":33"#, "streams: expected 1 to 32, got 33"),
            (
                r#","max_downtime_ms":0"#,
                "max_downtime_ms: expected milliseconds above 0",
            ),
            (
                r#","max_downtime_ms":1e300"#,
                "max_downtime_ms: expected milliseconds above 0",
            ),
            (
                r#","deadline_ms":-1"#,
                "deadline_ms: expected milliseconds above 0, got -1",
            ),
            (
                r#","bandwidth_bytes_per_s":0"#,
                "bandwidth_bytes_per_s: expected more than 0",
            ),
            (
                r#","final_bandwidth_bytes_per_s":0"#,
                "final_bandwidth_bytes_per_s: expected more",
            ),
            (r#","compression":"rar""#, "unknown variant `rar`"),
            (r#","speed":1"#, "unknown field `speed`"),
        ] {
            let error = request(more).unwrap_err();
            assert!(error.contains(expected), "{more}: {error}");
        }
        assert!(serde_json::from_str::<ResolveRequest>(r#"{"decision":"both"}"#).is_err());
    }
}
