//! The device: the host's random bytes into the guest's buffers.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use migration_state::Envelope;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::metrics::RngMetrics;
use super::state::RngState;
use crate::GuestMemory;
use crate::limited::Limited;
use crate::metrics::Counters;
use crate::virtio::device::RING_FEATURES;
use crate::virtio::{
    Chain, Description, DeviceError, HostBackend, Progress, QUEUE_SIZE, QueueError, Queues, VirtioDevice,
};

/// Most bytes that one request gets; the driver asks again if it wants more.
pub(super) const MAX_BYTES: u64 = 64 << 10;
/// Bytes fetched from the host at a time.
const BLOCK: usize = 4096;

/// The entropy device. Its bytes come from the host kernel's generator.
#[derive(Debug, Default)]
pub struct Rng {
    metrics: Arc<RngMetrics>,
    complaints: Limited,
}

impl Rng {
    /// A device.
    pub fn new() -> Self {
        Self::default()
    }

    /// Fills the chain's buffers as far as one request goes; returns the bytes written.
    fn fill(&self, memory: &GuestMemory, mut chain: Chain) -> u32 {
        let mut block = [0; BLOCK];
        let mut done = 0;
        let total = chain.writable.len().min(MAX_BYTES);
        while done < total {
            let part = BLOCK.min((total - done) as usize);
            let got = match getrandom(&mut block[..part], GetRandomFlags::empty()) {
                Ok(got) => got,
                Err(error) => {
                    self.complain(&error);
                    break;
                }
            };
            match chain.writable.fill(memory, &block[..got]) {
                Ok(0) => break,
                Ok(written) => done += written as u64,
                Err(error) => {
                    self.complain(&error);
                    break;
                }
            }
        }
        self.metrics.requests.add(1);
        self.metrics.bytes.add(done);
        // At most `MAX_BYTES`.
        done as u32
    }

    fn complain(&self, error: &dyn std::error::Error) {
        if let Some(count) = self.complaints.count() {
            tracing::warn!(count, "virtio-rng: request not served in full: {error}");
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        tracing::trace!(
            offset,
            len = data.len(),
            "virtio-rng has no configuration to write"
        );
    }

    fn activate(&mut self, features: u64) {
        tracing::debug!(features, "virtio-rng: driver ready");
    }

    fn process_queue(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        let Some(mut queue) = queues.get(index) else {
            return Ok(Progress::Idle);
        };
        queue.serve(|memory, chain| match chain {
            Ok(chain) => self.fill(memory, chain),
            Err(error) => {
                self.complain(&error);
                0
            }
        })
    }

    fn host_events(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn process_host(&mut self, _queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        Ok(Progress::Idle)
    }

    fn reset(&mut self) {
        tracing::debug!("virtio-rng: reset");
    }

    /// Requests are finished when they are taken; nothing is ever in flight or unwritten.
    fn drain(&mut self, _: &mut Queues<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        Ok(envelope.put(instance, &RngState {})?)
    }

    fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let RngState {} = envelope.take(instance)?;
        Ok(())
    }

    fn describe(&self) -> Description {
        Description::of::<RngState>(self.features())
    }

    fn host_backend(&self) -> Option<Arc<dyn HostBackend>> {
        None
    }

    fn metrics(&self) -> Arc<dyn Counters> {
        self.metrics.clone()
    }
}
