//! Compresses batches of pages on one stream, where that gets them to the destination sooner. Sends nothing itself.

use std::time::{Duration, Instant};

use migration_io::{Chooser, Compressor, GuestMemory, MemoryRange, Method};

use super::MigrateError;
use crate::options::Compression;
use crate::protocol::Span;

/// One stream's compression. A batch that is not worth it is sent as it is.
pub(super) struct Squeeze {
    compressor: Compressor,
    chooser: Chooser,
    /// The stream's speed, waits for the cap included; unknown before the first batch.
    bytes_per_s: Option<f64>,
}

/// The weight of the newest batch's speed in the average.
const NEWEST: f64 = 0.2;

impl Squeeze {
    pub(super) fn new(method: Compression) -> Result<Self, MigrateError> {
        let compressor = Compressor::new(match method {
            Compression::Lz4 => Method::Lz4,
            Compression::Zstd => Method::Zstd,
        })?;
        Ok(Self {
            compressor,
            chooser: Chooser::default(),
            bytes_per_s: None,
        })
    }

    /// The batch as a compressed block, if sending that takes less time.
    pub(super) fn compress(
        &mut self,
        memory: &GuestMemory,
        pages: &[Span],
    ) -> Result<Option<Vec<u8>>, MigrateError> {
        let Some(speed) = self.bytes_per_s.filter(|_| self.chooser.attempt()) else {
            return Ok(None);
        };
        let ranges: Vec<MemoryRange> = pages.iter().copied().map(MemoryRange::from).collect();
        let whole: u64 = ranges.iter().map(|range| range.len).sum();
        let began = Instant::now();
        let block = self.compressor.compress(memory, &ranges)?;
        let saved = block.map_or(0.0, |block| (whole - block.len() as u64) as f64 / speed);
        let block = block
            .filter(|_| saved > began.elapsed().as_secs_f64())
            .map(<[u8]>::to_vec);
        self.chooser.learn(block.is_some());
        Ok(block)
    }

    /// Learns the stream's speed: so many bytes were sent in this time.
    pub(super) fn learn(&mut self, bytes: u64, took: Duration) {
        let speed = bytes as f64 / took.as_secs_f64().max(1e-9);
        self.bytes_per_s = Some(
            self.bytes_per_s
                .map_or(speed, |before| before + NEWEST * (speed - before)),
        );
    }
}
