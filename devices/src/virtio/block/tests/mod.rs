//! A disk as a guest uses it, and what the other files of these tests share.

mod bounds;
mod engines;
mod host;
mod images;
mod locks;
mod modes;
mod moves;
mod requests;
mod slow;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;

use super::*;
use crate::rate::Limits;
use crate::virtio::testing::{DATA, Driver, DriverBuffer, reads, writes};

pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

pub(super) const HEADER: u64 = DATA;
pub(super) const STATUS: u64 = DATA + 0x100;
pub(super) const BUFFER: u64 = DATA + 0x1000;

pub(super) const OK: u8 = 0;
pub(super) const IOERR: u8 = 1;
pub(super) const UNSUPP: u8 = 2;

/// Runs a test with either engine, each on a disk of its own.
pub(super) fn with_both(test: impl Fn(&TestDisk)) {
    for engine in [IoEngine::Sync, IoEngine::Async] {
        eprintln!("{engine:?}");
        test(&TestDisk::with(engine));
    }
}

pub(super) struct TestDisk {
    pub(super) dir: TempDir,
    engine: IoEngine,
}

impl TestDisk {
    /// 64 sectors, each filled with its number.
    pub(super) fn new() -> Self {
        Self::with(IoEngine::default())
    }

    pub(super) fn with(engine: IoEngine) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..64u8).flat_map(|sector| [sector; 512]).collect();
        fs::write(dir.path().join("disk"), content).unwrap();
        Self { dir, engine }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    pub(super) fn device(&self, read_only: bool) -> VirtioBlock {
        self.limited(read_only, Limits::default())
    }

    pub(super) fn limited(&self, read_only: bool, limits: Limits) -> VirtioBlock {
        let parameters = BlockParameters {
            limits,
            ..Default::default()
        };
        self.with_parameters(read_only, parameters)
    }

    pub(super) fn with_parameters(&self, read_only: bool, parameters: BlockParameters) -> VirtioBlock {
        let access = Access {
            read_only,
            direct: parameters.direct,
            ..Default::default()
        };
        let parameters = BlockParameters {
            engine: self.engine,
            ..parameters
        };
        let backend = BlockBackend::open(&self.path(), access).unwrap();
        VirtioBlock::new(Arc::new(backend), "root", parameters).unwrap()
    }

    pub(super) fn driver(&self) -> Driver {
        Driver::ready(self.device(false))
    }
}

pub(super) fn header(driver: &Driver, kind: u32, sector: u64) {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    driver.fill(HEADER, &bytes);
    driver.fill(STATUS, &[0xff]);
}

/// Sends a request in the usual three parts; returns the status and the bytes written.
pub(super) fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[DriverBuffer]) -> (u8, u32) {
    header(driver, kind, sector);
    let parts = [&[reads(HEADER, 16)], data, &[writes(STATUS, 1)]].concat();
    let written = driver.submit(&parts);
    (driver.bytes(STATUS, 1)[0], written)
}

/// Sends a request about one range of sectors; returns the status.
pub(super) fn range(driver: &mut Driver, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    driver.fill(BUFFER, &bytes);
    request(driver, kind, 0, &[reads(BUFFER, 16)]).0
}
