//! Agrees with the destination on version, features and data path, and finds out whether it can run the machine.
//!
//! Everything here happens while the guest runs, and changes nothing about it.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::{MigrateError, SourceJob};
use crate::link::{Admitted, Link, LinkError};
use crate::options::{Compression, MAX_STREAMS};
use crate::ports::OfferedDisks;
use crate::protocol::{Features, Hello, MemoryTransfer, Message, Token};
use crate::text::clean;
use crate::transport::{Connection, Endpoint};

/// The first exchange also wakes the peer's threads and fills caches; the least of a few is the round trip.
const PINGS: usize = 4;

/// What the two sides have agreed on.
pub(super) struct Agreed {
    pub(super) token: Token,
    pub(super) transfer: MemoryTransfer,
    /// The devices whose disks come along.
    pub(super) disks: Vec<u32>,
    pub(super) compression: Option<Compression>,
    pub(super) round_trip: Duration,
}

impl SourceJob<'_> {
    /// Agrees with the destination on version, features and machine.
    pub(super) fn handshake(&mut self, link: &mut Link<'_>) -> Result<Agreed, MigrateError> {
        exchange_hello(link)?;
        link.admit(Admitted::Messages);
        link.send(&Message::Begin(Features::OURS))?;
        let (token, features) = match link.receive_message("session")? {
            Message::Session { token, features } => (token, features.and(Features::OURS)),
            other => return Err(unexpected("session", &other)),
        };
        let round_trip = measure_round_trip(link)?;
        let files = self
            .source
            .memory_files()
            // A handover has no streams, over which disks would be sent.
            .filter(|_| matches!(self.to, Endpoint::Unix(_)) && !self.options.with_disks)
            .filter(|_| features.has(Features::HANDOVER));
        let transfer = match &files {
            Some(_) => MemoryTransfer::Handover,
            None => MemoryTransfer::Streams(self.options.streams.clamp(1, MAX_STREAMS)),
        };
        let machine = self.source.describe();
        let devices = machine.devices.len();
        let marks = self
            .source
            .mark_disks(self.options.with_disks)
            .map_err(|source| MigrateError::Machine {
                call: "mark_disks",
                source,
            })?;
        link.send(&Message::Describe {
            machine,
            transfer,
            disks: OfferedDisks {
                come: self.options.with_disks,
                marks,
            },
        })?;
        if let Some(files) = &files {
            let files: Vec<_> = files.iter().map(OwnedFd::as_fd).collect();
            link.send_with_files(&Message::MemoryFiles, &files)?;
        }
        let disks = match link.receive_message("accept or refuse")? {
            Message::Accept { disks } => self.check_disks(disks, devices)?,
            Message::Refuse(differences) => return Err(MigrateError::Refused { differences }),
            other => return Err(unexpected("accept or refuse", &other)),
        };
        let wanted = |compression: &Compression| {
            features.has(match compression {
                Compression::Lz4 => Features::LZ4,
                Compression::Zstd => Features::ZSTD,
            })
        };
        Ok(Agreed {
            token,
            transfer,
            disks,
            compression: self.options.compression.filter(wanted),
            round_trip,
        })
    }

    /// Checks the list of disks that the destination wants to be sent: they may come along, and their devices exist.
    fn check_disks(&self, disks: Vec<u32>, devices: usize) -> Result<Vec<u32>, MigrateError> {
        let ascend = disks.windows(2).all(|pair| pair[0] < pair[1]);
        let exist = disks.iter().all(|disk| (*disk as usize) < devices);
        if !(disks.is_empty() || self.options.with_disks && ascend && exist) {
            let expected = if self.options.with_disks {
                format!("some of {devices} devices, ascending")
            } else {
                "none".into()
            };
            return Err(MigrateError::Disks {
                expected,
                got: format!("those of devices {disks:?}"),
            });
        }
        Ok(disks)
    }

    /// Opens the data streams.
    pub(super) fn open_streams(&self, agreed: &Agreed, count: u32) -> Result<Vec<Connection>, MigrateError> {
        let connect = |_| Connection::connect(&self.to, self.options.connect_timeout, self.control);
        let connections = (0..count).map(connect).collect::<Result<Vec<_>, _>>()?;
        for connection in &connections {
            connection.carry_pages(agreed.round_trip);
        }
        let mut links: Vec<_> = connections
            .iter()
            .map(|connection| self.link(connection))
            .collect();
        // All greetings are sent before the first answer is waited for: a round trip or two for all streams together.
        for (index, link) in (0..).zip(&mut links) {
            link.send(&Message::Hello(Hello::ours()))?;
            link.send(&Message::Join {
                token: agreed.token,
                index,
            })?;
        }
        for link in &mut links {
            check_hello(link)?;
            match link.receive_message("joined")? {
                Message::Joined => {}
                other => return Err(unexpected("joined", &other)),
            }
        }
        Ok(connections)
    }
}

/// Exchanges "hello". An error if the two sides have no protocol version in common.
pub(super) fn exchange_hello(link: &mut Link<'_>) -> Result<(), MigrateError> {
    link.send(&Message::Hello(Hello::ours()))?;
    check_hello(link)
}

fn check_hello(link: &mut Link<'_>) -> Result<(), MigrateError> {
    let theirs = match link.receive_message("hello")? {
        Message::Hello(hello) => hello,
        other => return Err(unexpected("hello", &other)),
    };
    match theirs.common_version() {
        Some(_) => Ok(()),
        None => Err(MigrateError::Version {
            ours: Hello::ours().versions(),
            theirs: theirs.versions(),
            release: clean(&theirs.release),
        }),
    }
}

fn measure_round_trip(link: &mut Link<'_>) -> Result<Duration, MigrateError> {
    let mut least = Duration::MAX;
    for _ in 0..PINGS {
        let sent = Instant::now();
        link.send(&Message::Ping)?;
        match link.receive_message("pong")? {
            Message::Pong => least = least.min(sent.elapsed()),
            other => return Err(unexpected("pong", &other)),
        }
    }
    Ok(least)
}

/// The error for a message that came out of turn.
pub(super) fn unexpected(expected: &'static str, got: &Message) -> MigrateError {
    LinkError::Unexpected {
        expected,
        got: got.name(),
    }
    .into()
}
