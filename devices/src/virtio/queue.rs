//! Access to a queue, the loop that serves it, and how much one turn does.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, ChainError};
use super::interrupt::Interrupt;
use crate::GuestMemory;

/// Chains after which a [`Turn`] is over.
pub(super) const TURN_CHAINS: usize = 64;
/// Bytes of work after which a [`Turn`] is over.
const TURN_BYTES: u64 = 4 << 20;

/// A device's queues, lent to it for one turn.
#[derive(Debug)]
pub struct Queues<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) queues: &'a mut [Option<Queue>],
    pub(super) interrupt: &'a Interrupt,
}

impl Queues<'_> {
    /// The queue `index`; `None` if the driver does not use it.
    pub fn get(&mut self, index: usize) -> Option<QueueAccess<'_>> {
        let queue = self.queues.get_mut(index)?.as_mut()?;
        Some(QueueAccess {
            memory: self.memory,
            queue,
            interrupt: self.interrupt,
        })
    }

    /// Interrupts the guest because the device's configuration space has changed.
    pub fn config_changed(&self) {
        self.interrupt.config_change();
    }
}

/// A queue, lent to a device for one turn.
#[derive(Debug)]
pub struct QueueAccess<'a> {
    memory: &'a GuestMemory,
    queue: &'a mut Queue,
    interrupt: &'a Interrupt,
}

/// A chain that was popped, or what is wrong with it. In both cases it must go back to the driver.
pub type PoppedChain = (ChainHead, Result<Chain, ChainError>);

/// The number of a chain's first descriptor, by which the chain is returned to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainHead(pub u16);

/// What a device did with a chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Bytes that were written to it.
    pub written: u32,
    /// Work besides reading and writing its buffers, in bytes: it counts towards the turn.
    pub work: u64,
}

impl From<u32> for Served {
    fn from(written: u32) -> Self {
        Self { written, work: 0 }
    }
}

/// What was done in one go. When a turn is over the device's lock is free for a moment, so that other devices are
/// served and a pause can begin, also if a driver adds chains as fast as they are served.
#[derive(Clone, Copy, Debug, Default)]
pub struct Turn {
    chains: usize,
    bytes: u64,
}

impl Turn {
    /// Counts a chain, and its work in bytes.
    pub fn count(&mut self, bytes: u64) {
        self.chains += 1;
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// Whether the turn has done enough.
    pub fn is_over(&self) -> bool {
        self.chains >= TURN_CHAINS || self.bytes >= TURN_BYTES
    }
}

/// Whether a queue needs another turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueProgress {
    /// No chain can be served now; the driver will kick, or another event comes.
    Idle,
    /// The turn is over and chains are left: another turn must follow without a kick.
    More,
}

impl QueueProgress {
    /// The progress of two queues together.
    pub fn and(self, other: Self) -> Self {
        if self == Self::More { self } else { other }
    }
}

/// Why a queue cannot be served any more.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings are inconsistent or lie outside memory.
    #[error("virtqueue is broken")]
    Ring(#[source] virtio_queue::Error),
}

impl<'a> QueueAccess<'a> {
    /// Guest memory, where the chains' buffers are.
    pub fn memory(&self) -> &'a GuestMemory {
        self.memory
    }

    /// Pops available chains, hands each to `serve_chain`, puts it into the used ring and interrupts the driver. A
    /// malformed chain comes as an error, and is returned to the driver as well.
    pub fn serve<S: Into<Served>>(
        &mut self,
        serve_chain: impl FnMut(&GuestMemory, Result<Chain, ChainError>) -> S,
    ) -> Result<QueueProgress, QueueError> {
        self.serve_admitted(|_| true, serve_chain)
    }

    /// As [`QueueAccess::serve`], but a chain is served only if `admit` returns true for its bytes. A chain that is not
    /// admitted stays available, and the driver need not kick for it: the device must serve the queue again by itself.
    pub fn serve_admitted<S: Into<Served>>(
        &mut self,
        mut admit: impl FnMut(u64) -> bool,
        mut serve_chain: impl FnMut(&GuestMemory, Result<Chain, ChainError>) -> S,
    ) -> Result<QueueProgress, QueueError> {
        let (mut turn, mut served) = (Turn::default(), false);
        let progress = loop {
            let Some((head, chain)) = self.pop()? else {
                break QueueProgress::Idle;
            };
            let len = chain.as_ref().map_or(0, Chain::len);
            if !admit(len) {
                self.undo_pop();
                break QueueProgress::Idle;
            }
            let Served { written, work } = serve_chain(self.memory, chain).into();
            self.add_used(head, written)?;
            served = true;
            turn.count(len + work);
            if turn.is_over() {
                break QueueProgress::More;
            }
        };
        if served {
            self.notify()?;
        }
        Ok(progress)
    }

    /// Pops the next available chain, for a device that finishes chains later: it must then call
    /// [`QueueAccess::add_used`] and, after one or several of them, [`QueueAccess::notify`]. `None` if no chain is
    /// available; the driver kicks when it adds one.
    pub fn pop(&mut self) -> Result<Option<PoppedChain>, QueueError> {
        let limit = usize::from(self.queue.size());
        let ring = QueueError::Ring;
        // Bounded, as a guest that keeps changing the index must not hold the device thread here.
        for _ in 0..TURN_CHAINS {
            if let Some(descriptors) = self.queue.iter(self.memory).map_err(ring)?.next() {
                self.queue.disable_notification(self.memory).map_err(ring)?;
                let head = ChainHead(descriptors.head_index());
                return Ok(Some((head, Chain::collect(descriptors, limit))));
            }
            // A chain that was added before kicks were enabled is served now: the driver sends no kick for it.
            if !self.queue.enable_notification(self.memory).map_err(ring)? {
                break;
            }
        }
        Ok(None)
    }

    /// Makes the chain that was popped last available again.
    pub fn undo_pop(&mut self) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Returns a chain to the driver, with `written` bytes in it.
    pub fn add_used(&mut self, head: ChainHead, written: u32) -> Result<(), QueueError> {
        self.queue
            .add_used(self.memory, head.0, written)
            .map_err(QueueError::Ring)
    }

    /// Returns chains, with the bytes written to each, so that the driver sees all of them or none, and notifies it.
    pub fn add_used_together(&mut self, chains: &[(ChainHead, u32)]) -> Result<(), QueueError> {
        // `virtio-queue` counts the chains that the driver was not notified of, but not those that are added here.
        self.notify()?;
        let (size, first) = (self.queue.size(), self.queue.next_used());
        let ring = self.queue.used_ring();
        let failed = |error| QueueError::Ring(virtio_queue::Error::GuestMemory(error));
        let mut next = first;
        for (head, written) in chains {
            let entry = ring + 4 + 8 * u64::from(next % size);
            let element = [u32::from(head.0).to_le(), written.to_le()];
            self.memory
                .write_obj(element, GuestAddress(entry))
                .map_err(failed)?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        self.memory
            .store(next.to_le(), GuestAddress(ring + 2), Ordering::Release)
            .map_err(failed)?;
        // The driver must see the index before the device reads whether it wants an interrupt (virtio 1.2, 2.7.10).
        fence(Ordering::SeqCst);
        if self.queue.event_idx_enabled() {
            let at = self.queue.avail_ring() + 4 + 2 * u64::from(size);
            let used_event: u16 = self
                .memory
                .load(GuestAddress(at), Ordering::Relaxed)
                .map_err(failed)?;
            let passed = next.wrapping_sub(u16::from_le(used_event)).wrapping_sub(1);
            if passed >= next.wrapping_sub(first) {
                return Ok(());
            }
        }
        self.raise()
    }

    /// Notifies the driver that chains were returned, if it wants an interrupt.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        if self
            .queue
            .needs_notification(self.memory)
            .map_err(QueueError::Ring)?
        {
            self.raise()?;
        }
        Ok(())
    }

    /// Raises the interrupt, unless the driver has set the flag that it polls (virtio 1.2, 2.7.7). With EVENT_IDX the
    /// caller has checked whether an interrupt is wanted, and the flag means nothing.
    fn raise(&self) -> Result<(), QueueError> {
        if !self.queue.event_idx_enabled() {
            let flags: u16 = self
                .memory
                .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
                .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))?;
            if u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 != 0 {
                return Ok(());
            }
        }
        self.interrupt.used_buffer();
        Ok(())
    }
}
