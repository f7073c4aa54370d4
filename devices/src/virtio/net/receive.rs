//! From the tap to the guest: one read a packet, straight into the buffers that the driver provides.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU};

use super::metrics::NetMetrics;
use super::transmit::PacketError;
use super::{ETHERNET_LEN, HEADER_LEN, offloads};
use crate::GuestMemory;
use crate::rate::Limiter;
use crate::virtio::queue::TURN_CHAINS;
use crate::virtio::sys::PacketVectors;
use crate::virtio::{Buffers, Chain, ChainError, ChainHead, QueueAccess, QueueError, QueueProgress};

/// Longest packet, with Ethernet's header, where segments are left to the guest (virtio 1.2, 5.1.6.3.1).
const SEGMENT_MAX: usize = 65550;
/// MTU of a driver that did not negotiate VIRTIO_NET_F_MTU.
const MTU: u16 = 1500;
/// Offset of the header's field with the number of buffers that the packet fills.
const NUM_BUFFERS: usize = 10;

/// What the driver's buffers must have room for.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReceiveLayout {
    /// Bytes of the longest packet with its headers: a read takes the whole packet or loses its end.
    longest: u64,
    /// Whether a packet may be spread over several buffers.
    mergeable: bool,
}

impl ReceiveLayout {
    /// For a driver that accepted `features`, of a device with this MTU.
    pub(super) fn new(features: u64, mtu: u16) -> Self {
        let mtu = if features & 1 << VIRTIO_NET_F_MTU != 0 {
            mtu
        } else {
            MTU
        };
        let frame = if offloads::has_segments(features) {
            SEGMENT_MAX
        } else {
            ETHERNET_LEN + usize::from(mtu)
        };
        Self {
            longest: (HEADER_LEN + frame) as u64,
            mergeable: features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
        }
    }

    /// Bytes that one chain must have room for.
    fn buffer_min(&self) -> u64 {
        if self.mergeable {
            HEADER_LEN as u64
        } else {
            self.longest
        }
    }
}

/// Reads packets from the tap until it is empty, the driver has no more buffers, the rate limit is reached or the turn
/// is over. A packet that does not fit now stays in the tap.
pub(super) fn receive_packets(
    queue: &mut QueueAccess<'_>,
    tap: BorrowedFd<'_>,
    layout: ReceiveLayout,
    limiter: &Limiter,
    metrics: &NetMetrics,
    warn: impl Fn(&PacketError),
) -> Result<QueueProgress, QueueError> {
    let mut pool = ReceivePool::new(queue.memory(), layout);
    let mut progress = QueueProgress::More;
    for _ in 0..TURN_CHAINS {
        let vectors = match pool.fill(queue)? {
            PoolFill::Enough(vectors) => vectors,
            PoolFill::Refused(error) => {
                warn(&error);
                continue;
            }
            PoolFill::TooLittle => {
                progress = QueueProgress::Idle;
                break;
            }
        };
        // The packet's length is known only after the read.
        if !limiter.has_tokens() {
            metrics.rx_throttled.add(1);
            progress = QueueProgress::Idle;
            break;
        }
        match vectors.read_from(tap) {
            Ok(len) => {
                pool.return_packet(queue, len)?;
                let bytes = len.saturating_sub(HEADER_LEN) as u64;
                limiter.consume(bytes);
                metrics.rx_packets.add(1);
                metrics.rx_bytes.add(bytes);
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    warn(&error.into());
                }
                progress = QueueProgress::Idle;
                break;
            }
        }
    }
    pool.undo_pops(queue);
    queue.notify()?;
    Ok(progress)
}

/// Chains that were popped from the queue, in their order, to hold the next packet.
struct ReceivePool<'a> {
    memory: &'a GuestMemory,
    layout: ReceiveLayout,
    chains: VecDeque<(ChainHead, Buffers)>,
    bytes: u64,
    buffers: usize,
}

/// The outcome of filling the pool.
enum PoolFill<'a> {
    /// The longest packet fits.
    Enough(PacketVectors<'a>),
    /// The driver has not provided enough.
    TooLittle,
    /// Its chains were malformed and have been returned to it empty.
    Refused(PacketError),
}

impl<'a> ReceivePool<'a> {
    fn new(memory: &'a GuestMemory, layout: ReceiveLayout) -> Self {
        Self {
            memory,
            layout,
            chains: VecDeque::new(),
            bytes: 0,
            buffers: 0,
        }
    }

    /// Pops chains until the longest packet fits.
    fn fill(&mut self, queue: &mut QueueAccess<'_>) -> Result<PoolFill<'a>, QueueError> {
        while self.bytes < self.layout.longest {
            let Some((head, chain)) = queue.pop()? else {
                return Ok(PoolFill::TooLittle);
            };
            match self.check(chain) {
                Ok(buffers) => self.push(head, buffers),
                Err(error) => {
                    self.push(head, Buffers::default());
                    return self.return_all_empty(queue, error);
                }
            }
        }
        let mut vectors = PacketVectors::new(self.memory);
        for (_, buffers) in &self.chains {
            if let Err(error) = vectors.push(buffers) {
                return self.return_all_empty(queue, error.into());
            }
        }
        Ok(PoolFill::Enough(vectors))
    }

    fn check(&self, chain: Result<Chain, ChainError>) -> Result<Buffers, PacketError> {
        let buffers = chain?.writable;
        let (expected, got) = (self.layout.buffer_min(), buffers.len());
        if got < expected {
            return Err(PacketError::Room { expected, got });
        }
        if self.buffers + buffers.count() > PacketVectors::MAX {
            return Err(PacketError::TooMany);
        }
        Ok(buffers)
    }

    /// Returns all chains to the driver empty, those before the bad one as well: only the chains that were popped last
    /// can be made available again, so none may be missing in between.
    fn return_all_empty(
        &mut self,
        queue: &mut QueueAccess<'_>,
        error: PacketError,
    ) -> Result<PoolFill<'a>, QueueError> {
        while let Some((head, _)) = self.pop() {
            queue.add_used(head, 0)?;
        }
        Ok(PoolFill::Refused(error))
    }

    /// Returns to the driver the chains that hold a packet of `len` bytes.
    fn return_packet(&mut self, queue: &mut QueueAccess<'_>, len: usize) -> Result<(), QueueError> {
        let first = self.chains.front().map(|(_, buffers)| buffers.clone());
        let mut rest = len as u64;
        let mut used = Vec::new();
        while rest > 0 {
            let Some((head, buffers)) = self.pop() else { break };
            let written = rest.min(buffers.len());
            rest -= written;
            // A packet has less than 128 KiB.
            used.push((head, written as u32));
        }
        // The tap does not fill in this field of the header. There are 256 buffers at most.
        let count = (used.len() as u16).to_le_bytes();
        if let Some(first) = first {
            first
                .write_at(self.memory, NUM_BUFFERS, &count)
                .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))?;
        }
        match used[..] {
            [(head, written)] => queue.add_used(head, written),
            _ => queue.add_used_together(&used),
        }
    }

    fn push(&mut self, head: ChainHead, buffers: Buffers) {
        self.bytes += buffers.len();
        self.buffers += buffers.count();
        self.chains.push_back((head, buffers));
    }

    fn pop(&mut self) -> Option<(ChainHead, Buffers)> {
        let (head, buffers) = self.chains.pop_front()?;
        self.bytes -= buffers.len();
        self.buffers -= buffers.count();
        Some((head, buffers))
    }

    /// Makes the remaining chains available again.
    fn undo_pops(self, queue: &mut QueueAccess<'_>) {
        for _ in &self.chains {
            queue.undo_pop();
        }
    }
}
