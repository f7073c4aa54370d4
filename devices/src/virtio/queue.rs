//! Serving a queue: the loop that every device shares.

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::chain::{Chain, ChainError};
use super::interrupt::Interrupt;
use crate::GuestMemory;

/// Work after which [`QueueAccess::serve`] lets others have a turn: the device's lock is free for a moment, a
/// pause gets in. A driver that adds chains as fast as they are served holds up nobody.
const TURN_CHAINS: usize = 64;
const TURN_BYTES: u64 = 4 << 20;

/// A queue, lent to a device for one turn.
#[derive(Debug)]
pub struct QueueAccess<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) queue: &'a mut Queue,
    pub(super) interrupt: &'a Interrupt,
}

/// Whether a queue is done for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing is left; the driver will kick.
    Idle,
    /// The turn is over and chains are left: another turn must follow without a kick.
    More,
}

/// A queue that cannot be served any more.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings say something impossible or lie outside memory.
    #[error("virtqueue is broken")]
    Ring(#[source] virtio_queue::Error),
}

impl QueueAccess<'_> {
    /// Hands available chains to `serve_chain`, which returns the bytes that it wrote to each, and gives the
    /// driver its due: used ring, interrupts. A chain that is itself malformed comes as an error; whatever is
    /// returned for it, it goes back to the driver.
    pub fn serve(
        &mut self,
        mut serve_chain: impl FnMut(&GuestMemory, Result<Chain, ChainError>) -> u32,
    ) -> Result<Progress, QueueError> {
        let (mut turns, mut bytes, mut served) = (0, 0, false);
        self.queue
            .disable_notification(self.memory)
            .map_err(QueueError::Ring)?;
        let progress = loop {
            let limit = usize::from(self.queue.size());
            let found = self.queue.iter(self.memory).map_err(QueueError::Ring)?.next();
            if let Some(descriptors) = found {
                let head = descriptors.head_index();
                let chain = Chain::collect(descriptors, limit);
                bytes += chain.as_ref().map_or(0, Chain::len);
                let written = serve_chain(self.memory, chain);
                self.queue
                    .add_used(self.memory, head, written)
                    .map_err(QueueError::Ring)?;
                served = true;
            } else if self
                .queue
                .enable_notification(self.memory)
                .map_err(QueueError::Ring)?
            {
                // Chains came in between; this counts too, so that the guest cannot keep us here.
                self.queue
                    .disable_notification(self.memory)
                    .map_err(QueueError::Ring)?;
            } else {
                break Progress::Idle;
            }
            turns += 1;
            if turns >= TURN_CHAINS || bytes >= TURN_BYTES {
                break Progress::More;
            }
        };
        if served
            && self
                .queue
                .needs_notification(self.memory)
                .map_err(QueueError::Ring)?
        {
            self.interrupt.used_buffer();
        }
        Ok(progress)
    }
}
