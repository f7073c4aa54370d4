//! The device: the host's random bytes into the guest's buffers.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use migration_state::Envelope;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::metrics::RngMetrics;
use super::state::RngState;
use crate::GuestMemory;
use crate::log_damper::LogDamper;
use crate::metrics::Counters;
use crate::rate::{Limiter, Limits};
use crate::virtio::device::RING_FEATURES;
use crate::virtio::{
    Chain, Description, DeviceError, HostBackend, QUEUE_SIZE, QueueError, QueueProgress, Queues, VirtioDevice,
};

/// Most bytes that one request gets; the driver asks again if it wants more.
pub(super) const MAX_BYTES: u64 = 64 << 10;
/// Bytes fetched from the host at a time.
const BLOCK: usize = 4096;

/// The only queue.
const QUEUE: usize = 0;

/// The entropy device. Its bytes come from the host kernel's generator.
#[derive(Debug)]
pub struct VirtioRng {
    limits: Limits,
    limiter: Limiter,
    metrics: Arc<RngMetrics>,
    warnings: LogDamper,
}

impl VirtioRng {
    /// A device with rate limits, which were checked.
    pub fn new(limits: Limits) -> io::Result<Self> {
        Ok(Self {
            limits,
            limiter: Limiter::new(limits)?,
            metrics: Arc::default(),
            warnings: LogDamper::default(),
        })
    }

    fn serve(&self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        let Some(mut queue) = queues.get(QUEUE) else {
            return Ok(QueueProgress::Idle);
        };
        queue.serve_admitted(
            |bytes| self.admit(bytes),
            |memory, chain| match chain {
                Ok(chain) => self.fill(memory, chain),
                Err(error) => {
                    self.warn(&error);
                    0
                }
            },
        )
    }

    fn admit(&self, bytes: u64) -> bool {
        let admitted = self.limiter.try_consume(bytes.min(MAX_BYTES));
        if !admitted {
            self.metrics.throttled.add(1);
        }
        admitted
    }

    /// Fills the chain's buffers with at most [`MAX_BYTES`]; returns the bytes written.
    fn fill(&self, memory: &GuestMemory, mut chain: Chain) -> u32 {
        let mut block = [0; BLOCK];
        let mut done = 0;
        let total = chain.writable.len().min(MAX_BYTES);
        while done < total {
            let part = BLOCK.min((total - done) as usize);
            let got = match getrandom(&mut block[..part], GetRandomFlags::empty()) {
                Ok(got) => got,
                Err(error) => {
                    self.warn(&error);
                    break;
                }
            };
            match chain.writable.fill(memory, &block[..got]) {
                Ok(0) => break,
                Ok(written) => done += written as u64,
                Err(error) => {
                    self.warn(&error);
                    break;
                }
            }
        }
        self.metrics.requests.add(1);
        self.metrics.bytes.add(done);
        // At most `MAX_BYTES`.
        done as u32
    }

    fn warn(&self, error: &dyn std::error::Error) {
        if let Some(count) = self.warnings.count() {
            tracing::warn!(count, "virtio-rng: request not served in full: {error}");
        }
    }
}

impl VirtioDevice for VirtioRng {
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

    fn process_queue(&mut self, _index: usize, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        self.serve(queues)
    }

    fn host_events(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.limiter.event()]
    }

    fn process_host(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        self.limiter.clear_event();
        self.serve(queues)
    }

    fn reset(&mut self) -> bool {
        tracing::debug!("virtio-rng: reset");
        true
    }

    /// Requests are finished in the call that pops them; nothing is ever in flight.
    fn drain(&mut self, _: &mut Queues<'_>, _: Instant) -> Result<(), DeviceError> {
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
        Description {
            parameters: self.limits.to_bytes(),
            ..Description::of::<RngState>(self.features())
        }
    }

    fn host_backend(&self) -> Option<Arc<dyn HostBackend>> {
        None
    }

    fn metrics(&self) -> Arc<dyn Counters> {
        self.metrics.clone()
    }
}
