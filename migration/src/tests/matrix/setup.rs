//! Migrations that bring every message about.

use std::sync::Arc;
use std::time::Duration;

use fault_proxy::{Direction, FaultPoint, FramePart, ProxyConnection};

use super::super::disk::FakeDisk;
use super::super::fake::{FakeDestination, FakeSource, PortFault};
use super::super::guest::{HIGH, Load, TestGuest};
use super::harm::Harm;
use crate::*;

/// A sort of migration.
pub(super) struct Setup {
    pub(super) name: &'static str,
    /// Whether memory is handed over, on a Unix socket.
    pub(super) handover: bool,
    pub(super) compression: Option<Compression>,
    /// Whether a disk comes along.
    pub(super) disks: bool,
    /// A fault without which the messages that are looked at would not come.
    pub(super) first: Option<(ProxyConnection, Direction, &'static str, Harm)>,
    /// A call of the source's machine that takes long.
    pub(super) slow: Option<&'static str>,
    /// What is wrong with the destination's machine.
    pub(super) destination: Option<(&'static str, PortFault)>,
    /// Which of its messages are looked at.
    pub(super) looks_at: fn(&FaultPoint) -> bool,
}

const PLAIN: Setup = Setup {
    name: "copy",
    handover: false,
    compression: None,
    disks: false,
    first: None,
    slow: None,
    destination: None,
    looks_at: |_| true,
};

const LONG: Duration = Duration::from_millis(300);

fn asks(point: &FaultPoint) -> bool {
    point.connection == ProxyConnection::Ask
}

const fn lost(name: &'static str, direction: Direction, message: &'static str) -> Setup {
    Setup {
        name,
        first: Some((ProxyConnection::Control, direction, message, Harm::Reset)),
        looks_at: asks,
        ..PLAIN
    }
}

/// Between them they have every message of the protocol.
pub(super) static SETUPS: [Setup; 13] = [
    PLAIN,
    Setup {
        name: "compressed",
        compression: Some(Compression::Zstd),
        looks_at: |point| point.message == "compressed pages",
        ..PLAIN
    },
    Setup {
        name: "with a disk",
        disks: true,
        looks_at: |point| ["describe", "accept", "pages"].contains(&point.message.as_str()),
        ..PLAIN
    },
    Setup {
        name: "handover",
        handover: true,
        ..PLAIN
    },
    lost("ready is lost", Direction::ToSource, "ready"),
    lost("go is lost", Direction::ToDestination, "go"),
    lost("resumed is lost", Direction::ToSource, "resumed"),
    Setup {
        destination: Some(("resume", PortFault::Error)),
        ..lost("resume failed is lost", Direction::ToSource, "resume failed")
    },
    Setup {
        name: "resume fails",
        destination: Some(("resume", PortFault::Error)),
        looks_at: |point| point.message == "resume failed",
        ..PLAIN
    },
    Setup {
        name: "refused",
        destination: Some(("check", PortFault::Error)),
        looks_at: |point| point.message == "refuse",
        ..PLAIN
    },
    Setup {
        name: "the source aborts",
        first: Some((
            ProxyConnection::Control,
            Direction::ToSource,
            "round ack",
            Harm::Corrupt(FramePart::Kind),
        )),
        looks_at: |point| point.message == "abort",
        ..PLAIN
    },
    Setup {
        name: "the destination aborts",
        destination: Some(("restore", PortFault::Error)),
        looks_at: |point| point.message == "abort",
        ..PLAIN
    },
    Setup {
        name: "slow",
        slow: Some("drain"),
        destination: Some(("restore", PortFault::Slow(LONG))),
        looks_at: |point| point.message == "keep-alive",
        ..PLAIN
    },
];

impl Setup {
    pub(super) fn options(&self) -> MigrateOptions {
        MigrateOptions {
            max_downtime: Duration::from_secs(5),
            on_miss: OnMiss::Switch,
            verify: true,
            compression: self.compression,
            with_disks: self.disks,
            // Else it does not pay.
            bandwidth: self.compression.map(|_| 8 << 20),
            connect_timeout: Duration::from_millis(500),
            io_timeout: Duration::from_millis(250),
            step_timeout: Duration::from_millis(700),
            ..MigrateOptions::default()
        }
    }

    /// A machine whose guest writes all the time, but not much: many of them run at once.
    pub(super) fn source(&self) -> FakeSource {
        let (low, high) = (192, 64);
        let (mut guest, files) = if self.handover {
            let (guest, files) = TestGuest::shared(low, high);
            (guest, Some(files))
        } else {
            (TestGuest::new(low, high), None)
        };
        for page in 0..low {
            guest.write(page * PAGE_SIZE, page % 5 == 0);
        }
        for page in 0..high {
            guest.write(HIGH + page * PAGE_SIZE, false);
        }
        guest.throttle(0.95);
        let disk = self.disks.then(|| Arc::new(FakeDisk::new()));
        if let Some(disk) = &disk {
            disk.write_and_mark(0, &[7; 40 << 10]);
            guest.writes_to(disk.clone());
        }
        guest.start(Load { pages: low + high });
        let mut source = FakeSource::new(guest);
        source.files = files;
        source.disk = disk;
        source
            .faults
            .extend(self.slow.map(|call| (call, PortFault::Slow(LONG))));
        source
    }

    pub(super) fn destination(&self) -> FakeDestination {
        let mut destination = FakeDestination::default();
        destination.faults.extend(self.destination);
        destination
    }
}
