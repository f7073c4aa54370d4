//! The device: packets between its queues and its connections, and the event that reports a move to the guest.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use migration_state::Envelope;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::backend::VsockBackend;
use super::connection::BUFFER_SIZE;
use super::connections::VsockConnections;
use super::packet::{HEADER_LEN, PacketOp, VsockHeader};
use super::parameters::VsockParameters;
use super::state::VsockState;
use crate::GuestMemory;
use crate::log_damper::LogDamper;
use crate::metrics::Counters;
use crate::rate::Limiter;
use crate::virtio::device::{RING_FEATURES, read_bytes};
use crate::virtio::{
    Chain, Description, DeviceError, HostBackend, QUEUE_SIZE, QueueAccess, QueueError, QueueProgress, Queues,
    VirtioDevice,
};

/// VIRTIO_VSOCK_F_STREAM (virtio 1.2, 5.10.3).
const F_STREAM: u64 = 1 << 0;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (virtio 1.2, 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// The queue of packets to the guest (virtio 1.2, 5.10.2).
const TO_GUEST: usize = 0;
/// The queue of packets from the guest.
const FROM_GUEST: usize = 1;
/// The queue of events to the guest.
const EVENTS: usize = 2;
/// Packets in one turn, each way, with at most [`BUFFER_SIZE`] bytes of data each.
const TURN_PACKETS: usize = 64;

/// A socket device.
#[derive(Debug)]
pub struct VirtioVsock {
    backend: Arc<VsockBackend>,
    parameters: VsockParameters,
    rx_limiter: Limiter,
    tx_limiter: Limiter,
    connections: VsockConnections,
    reset_notice: ResetNotice,
    /// Buffer for a packet's data.
    room: Box<[u8]>,
    warnings: LogDamper,
}

/// The event that tells the guest's driver that all connections are gone. Until the driver has handled it there are no
/// new connections, as the driver would drop them with the old ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ResetNotice {
    /// No event is due.
    None,
    /// The event must be sent.
    Due,
    /// The event was sent. The driver has handled it when more than `spare` buffers for events are available.
    Sent { spare: usize },
}

impl VirtioVsock {
    /// A device on `backend`. The parameters were checked.
    pub fn new(backend: Arc<VsockBackend>, parameters: VsockParameters) -> io::Result<Self> {
        Ok(Self {
            connections: VsockConnections::new(backend.clone(), parameters.guest_cid),
            backend,
            parameters,
            rx_limiter: Limiter::new(parameters.limits)?,
            tx_limiter: Limiter::new(parameters.limits)?,
            reset_notice: ResetNotice::None,
            room: vec![0; BUFFER_SIZE].into(),
            warnings: LogDamper::default(),
        })
    }

    /// Serves everything, whichever event came: where nothing happened there is little to do.
    fn process_queues(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        if !self.deliver_reset_notice(queues)? {
            return Ok(QueueProgress::Idle);
        }
        let host = self.connections.process_host_events();
        let transmitted = self.process_tx_queue(queues)?;
        let received = self.process_rx_queue(queues)?;
        self.connections.arm_timer();
        // If refusals hold up the guest's packets, the guest's next buffer for packets, with which it kicks, goes on
        // with both.
        let held_up = !self.connections.can_refuse();
        let more = host == QueueProgress::More || received == QueueProgress::More;
        Ok(if more || transmitted == QueueProgress::More && !held_up {
            QueueProgress::More
        } else {
            QueueProgress::Idle
        })
    }

    /// Sends the event if one is due; returns whether connections may be served.
    fn deliver_reset_notice(&mut self, queues: &mut Queues<'_>) -> Result<bool, QueueError> {
        if self.reset_notice == ResetNotice::None {
            return Ok(true);
        }
        let Some(mut queue) = queues.get(EVENTS) else {
            return Ok(true);
        };
        match self.reset_notice {
            ResetNotice::Due => self.send_reset_notice(&mut queue)?,
            ResetNotice::Sent { spare } if count_available(&mut queue)? > spare => {
                self.reset_notice = ResetNotice::None
            }
            ResetNotice::Sent { .. } | ResetNotice::None => {}
        }
        Ok(self.reset_notice == ResetNotice::None)
    }

    fn send_reset_notice(&mut self, queue: &mut QueueAccess<'_>) -> Result<(), QueueError> {
        // Without a buffer the event waits; the driver kicks when it adds one.
        let Some((head, chain)) = queue.pop()? else {
            return Ok(());
        };
        let event = TRANSPORT_RESET.to_le_bytes();
        let filled = chain.is_ok_and(|mut chain| {
            let filled = chain.writable.fill(queue.memory(), &event);
            filled.is_ok_and(|count| count == event.len())
        });
        if !filled {
            self.warn("no room for the news of a move in a buffer for events");
        }
        let spare = count_available(queue)?;
        queue.add_used(head, if filled { event.len() as u32 } else { 0 })?;
        queue.notify()?;
        self.reset_notice = ResetNotice::Sent { spare };
        Ok(())
    }

    fn process_tx_queue(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        let Some(mut queue) = queues.get(FROM_GUEST) else {
            return Ok(QueueProgress::Idle);
        };
        let mut taken = 0;
        let progress = loop {
            if taken == TURN_PACKETS || !self.connections.can_refuse() {
                break QueueProgress::More;
            }
            if !self.tx_limiter.has_tokens() {
                self.connections.metrics.tx_throttled.add(1);
                break QueueProgress::Idle;
            }
            let Some((head, chain)) = queue.pop()? else {
                break QueueProgress::Idle;
            };
            let bytes = chain.as_ref().map_or(0, |chain| chain.readable.len());
            self.tx_limiter.consume(bytes.saturating_sub(HEADER_LEN as u64));
            match chain {
                Ok(chain) => self.process_packet(queue.memory(), chain),
                Err(error) => self.warn(error),
            }
            queue.add_used(head, 0)?;
            taken += 1;
        };
        if taken > 0 {
            queue.notify()?;
        }
        Ok(progress)
    }

    fn process_packet(&mut self, memory: &GuestMemory, mut chain: Chain) {
        let mut header = [0; HEADER_LEN];
        match chain.readable.read(memory, &mut header) {
            Ok(HEADER_LEN) => {}
            Ok(got) => return self.warn(format_args!("a packet of {got} bytes")),
            Err(error) => return self.warn(error),
        }
        let mut header = VsockHeader::decode(&header);
        let len = match header.op {
            Some(PacketOp::Data) => header.len as usize,
            _ => 0,
        };
        let data = self.room.get_mut(..len).unwrap_or_default();
        if !chain.readable.read(memory, data).is_ok_and(|read| read == len) {
            self.warn(format_args!("a packet without the {len} bytes that it announces"));
            header.op = None;
        }
        let data = self.room.get(..len).unwrap_or_default();
        self.connections.metrics.sent(header.op, data.len() as u64);
        self.connections.process_packet(&header, data);
    }

    fn process_rx_queue(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        let Some(mut queue) = queues.get(TO_GUEST) else {
            return Ok(QueueProgress::Idle);
        };
        let mut given = 0;
        let progress = loop {
            if !self.connections.has_packets() {
                break QueueProgress::Idle;
            }
            if given == TURN_PACKETS {
                break QueueProgress::More;
            }
            if !self.rx_limiter.has_tokens() {
                self.connections.metrics.rx_throttled.add(1);
                break QueueProgress::Idle;
            }
            let Some((head, chain)) = queue.pop()? else {
                break QueueProgress::Idle;
            };
            let written = match chain {
                Ok(chain) if chain.writable.len() > HEADER_LEN as u64 => {
                    self.fill_packet(queue.memory(), chain)
                }
                Ok(chain) => {
                    self.warn(format_args!(
                        "no room for a packet in {} bytes",
                        chain.writable.len()
                    ));
                    Some(0)
                }
                Err(error) => {
                    self.warn(error);
                    Some(0)
                }
            };
            let Some(written) = written else {
                queue.undo_pop();
                break QueueProgress::Idle;
            };
            let bytes = u64::from(written).saturating_sub(HEADER_LEN as u64);
            self.rx_limiter.consume(bytes);
            queue.add_used(head, written)?;
            given += 1;
        };
        if given > 0 {
            queue.notify()?;
        }
        Ok(progress)
    }

    /// Writes the next packet to a chain, which has room for more than a header; returns the packet's bytes. `None` if
    /// there is no packet.
    fn fill_packet(&mut self, memory: &GuestMemory, mut chain: Chain) -> Option<u32> {
        let most = chain.writable.len() - HEADER_LEN as u64;
        let most = self.room.len().min(usize::try_from(most).unwrap_or(usize::MAX));
        let header = self.connections.next(&mut self.room[..most])?;
        let data = &self.room[..header.len as usize];
        let filled = chain.writable.fill(memory, &header.encode());
        match filled.and_then(|_| chain.writable.fill(memory, data)) {
            Ok(_) => {
                self.connections.metrics.received(header.op, header.len.into());
                Some(HEADER_LEN as u32 + header.len)
            }
            Err(error) => {
                self.warn(error);
                self.connections.packet_lost(&header);
                Some(0)
            }
        }
    }

    fn warn(&self, why: impl std::fmt::Display) {
        if let Some(count) = self.warnings.count() {
            let socket = self.backend.path().display();
            tracing::warn!(%socket, count, "virtio-vsock: {why}");
        }
    }
}

/// Counts the available chains. The driver kicks when it adds another.
fn count_available(queue: &mut QueueAccess<'_>) -> Result<usize, QueueError> {
    let mut count = 0;
    while count < usize::from(QUEUE_SIZE) && queue.pop()?.is_some() {
        count += 1;
    }
    (0..count).for_each(|_| queue.undo_pop());
    Ok(count)
}

impl VirtioDevice for VirtioVsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        RING_FEATURES | F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    /// The guest's address, 64 bits (virtio 1.2, 5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&u64::from(self.parameters.guest_cid).to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let len = data.len();
        tracing::debug!(
            offset,
            len,
            "virtio-vsock: nothing in the configuration is writable"
        );
    }

    fn activate(&mut self, features: u64) {
        tracing::debug!(features, "virtio-vsock: driver ready");
    }

    fn process_queue(&mut self, _index: usize, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        self.process_queues(queues)
    }

    fn host_events(&self) -> Vec<BorrowedFd<'_>> {
        vec![
            self.backend.events(),
            self.rx_limiter.event(),
            self.tx_limiter.event(),
        ]
    }

    fn process_host(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        self.rx_limiter.clear_event();
        self.tx_limiter.clear_event();
        self.process_queues(queues)
    }

    fn reset(&mut self) -> bool {
        self.connections.clear();
        self.reset_notice = ResetNotice::None;
        true
    }

    /// Nothing to finish: data from the guest were written to the host's programs, or are in a connection's buffer, and
    /// connections end with a move.
    fn drain(&mut self, _: &mut Queues<'_>, _: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let state = VsockState {
            guest_cid: self.parameters.guest_cid,
            next_port: self.connections.next_port(),
        };
        Ok(envelope.put(instance, &state)?)
    }

    fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let state: VsockState = envelope.take(instance)?;
        state.check(self.parameters.guest_cid)?;
        self.connections.set_next_port(state.next_port);
        self.reset_notice = ResetNotice::Due;
        Ok(())
    }

    fn describe(&self) -> Description {
        Description {
            parameters: self.parameters.to_bytes(),
            ..Description::of::<VsockState>(self.features())
        }
    }

    fn host_backend(&self) -> Option<Arc<dyn HostBackend>> {
        Some(self.backend.clone())
    }

    fn metrics(&self) -> Arc<dyn Counters> {
        self.connections.metrics.clone()
    }
}
