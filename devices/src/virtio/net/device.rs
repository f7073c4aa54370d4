//! The device: packets between pairs of queues and a tap, on the device thread.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use migration_state::Envelope;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP,
};

use super::announce::Announcer;
use super::metrics::NetMetrics;
use super::parameters::{MAX_QUEUE_PAIRS, NetParameters};
use super::state::NetState;
use super::tap::{Tap, TapError};
use crate::log_damper::LogDamper;
use crate::metrics::Counters;
use crate::rate::{Bucket, Limiter, Limits};
use crate::virtio::device::{RING_FEATURES, read_bytes};
use crate::virtio::{
    Description, DeviceError, HostBackend, HostError, QUEUE_SIZE, QueueError, QueueProgress, Queues,
    VirtioDevice,
};

/// The queue of a pair in which the guest receives packets (virtio 1.2, 5.1.2).
pub(super) const RECEIVE: usize = 0;
/// The queue of a pair in which the guest sends packets.
pub(super) const TRANSMIT: usize = 1;
/// The control queue comes after the last pair.
pub(super) const QUEUES_OF_A_PAIR: usize = 2;
static QUEUE_SIZES: [u16; QUEUES_OF_A_PAIR * MAX_QUEUE_PAIRS as usize + 1] =
    [QUEUE_SIZE; QUEUES_OF_A_PAIR * MAX_QUEUE_PAIRS as usize + 1];

/// Features that do not depend on the tap.
const FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | GUEST_ANNOUNCE;
pub(super) const MQ: u64 = 1 << VIRTIO_NET_F_MQ;
pub(super) const GUEST_ANNOUNCE: u64 = 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;

/// Limits of the control queue: each command may take a lock that all of the host's network needs, a dozen times.
pub(super) const COMMAND_LIMITS: Limits = Limits {
    bandwidth: None,
    operations: Some(Bucket {
        size: COMMANDS,
        one_time_burst: 0,
        refill_time_ms: 1000,
    }),
};
pub(super) const COMMANDS: u64 = 8;

const LINK_UP: u16 = VIRTIO_NET_S_LINK_UP as u16;
const ANNOUNCE: u16 = VIRTIO_NET_S_ANNOUNCE as u16;
/// Address at 0, status at 6, the number of queue pairs at 8, MTU at 10.
const CONFIG_LEN: usize = 12;

/// A network card. After a restore it announces the guest's address on the new network, and asks the guest to do so
/// too.
#[derive(Debug)]
pub struct VirtioNet {
    pub(super) tap: Tap,
    pub(super) parameters: NetParameters,
    /// Features that the driver accepted.
    pub(super) features: u64,
    /// Pairs of queues that the driver uses: the first ones.
    pub(super) active_pairs: u16,
    /// Counts calls of `process_host`: each begins with another pair, or the first pair could use up all tokens.
    pub(super) turn: usize,
    pub(super) rx_limiter: Limiter,
    pub(super) tx_limiter: Limiter,
    pub(super) command_limiter: Limiter,
    /// The guest is to announce itself and has not acknowledged that yet (virtio 1.2, 5.1.6.5.4).
    pub(super) announce_pending: bool,
    pub(super) announcer: Announcer,
    pub(super) metrics: Arc<NetMetrics>,
    pub(super) warnings: LogDamper,
}

impl VirtioNet {
    /// A card on `tap`, whose packets must not be smaller than the card's. The parameters were checked.
    pub fn new(tap: Tap, parameters: NetParameters) -> Result<Self, TapError> {
        if tap.mtu() < parameters.mtu {
            return Err(TapError::Mtu {
                tap: tap.name().into(),
                expected: parameters.mtu,
                got: tap.mtu(),
            });
        }
        let failed = |source| TapError::Io {
            tap: tap.name().into(),
            what: "make a timer for it",
            source,
        };
        let announcer = Announcer::new().map_err(failed)?;
        let rx_limiter = Limiter::new(parameters.rx_limits).map_err(failed)?;
        let tx_limiter = Limiter::new(parameters.tx_limits).map_err(failed)?;
        let command_limiter = Limiter::new(COMMAND_LIMITS).map_err(failed)?;
        Ok(Self {
            tap: tap.with_queues(parameters.queue_pairs)?,
            parameters,
            features: 0,
            active_pairs: 1,
            turn: 0,
            rx_limiter,
            tx_limiter,
            command_limiter,
            announce_pending: false,
            announcer,
            metrics: Arc::default(),
            warnings: LogDamper::default(),
        })
    }

    /// The card without a limit for commands: a property test has thousands of cases.
    #[cfg(test)]
    pub(crate) fn without_command_limit(self) -> Self {
        let command_limiter = Limiter::new(Limits::default()).unwrap();
        Self {
            command_limiter,
            ..self
        }
    }
}

impl VirtioDevice for VirtioNet {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let many = if self.parameters.queue_pairs > 1 { MQ } else { 0 };
        RING_FEATURES | FEATURES | many | self.tap.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES[..QUEUES_OF_A_PAIR * usize::from(self.parameters.queue_pairs) + 1]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = LINK_UP | if self.announce_pending { ANNOUNCE } else { 0 };
        let mut config = [0; CONFIG_LEN];
        config[..6].copy_from_slice(&self.parameters.mac.bytes());
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&self.parameters.queue_pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.parameters.mtu.to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        tracing::debug!(
            offset,
            len = data.len(),
            "virtio-net: nothing in the configuration is writable"
        );
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        // A driver without VIRTIO_NET_F_MQ uses one pair and sends no command. After a restore the driver may use more.
        let pairs = if features & MQ != 0 { self.active_pairs } else { 1 };
        if let Err(error) = self.set_active_pairs(pairs) {
            self.warn("queues", &error);
        }
        if let Err(error) = self.tap.set_features(features) {
            self.warn("offloads", &error);
        }
    }

    fn process_queue(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        let pair = index / QUEUES_OF_A_PAIR;
        if index == self.control_queue() {
            self.process_control_queue(queues)
        } else if index % QUEUES_OF_A_PAIR == RECEIVE {
            self.process_receive_queue(pair, queues)
        } else {
            self.process_transmit_queue(pair, queues)
        }
    }

    fn host_events(&self) -> Vec<BorrowedFd<'_>> {
        let timers = [
            self.announcer.as_fd(),
            self.rx_limiter.event(),
            self.tx_limiter.event(),
            self.command_limiter.event(),
        ];
        self.tap.queues().chain(timers).collect()
    }

    fn process_host(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        self.send_announcement(queues);
        self.turn = self.turn.wrapping_add(1);
        self.rx_limiter.clear_event();
        self.tx_limiter.clear_event();
        self.command_limiter.clear_event();
        let commands = self.process_control_queue(queues)?;
        let sent = if self.parameters.tx_limits == Limits::default() {
            QueueProgress::Idle
        } else {
            self.process_transmit_queues(queues)?
        };
        Ok(match self.process_receive_queues(queues)? {
            QueueProgress::Idle => sent.and(commands),
            QueueProgress::More => QueueProgress::More,
        })
    }

    fn reset(&mut self) -> bool {
        self.features = 0;
        self.active_pairs = 1;
        self.announce_pending = false;
        if let Err(error) = self.announcer.stop() {
            self.warn("announcement", &error);
        }
        if let Err(error) = self.tap.set_features(0) {
            self.warn("offloads", &error);
        }
        true
    }

    /// A packet is handed to the tap in the call that pops it; nothing is ever in flight.
    fn drain(&mut self, _: &mut Queues<'_>, _: Instant) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let state = NetState {
            mac: self.parameters.mac,
            mtu: self.parameters.mtu,
            queue_pairs: self.parameters.queue_pairs,
            active_pairs: self.active_pairs,
        };
        Ok(envelope.put(instance, &state)?)
    }

    fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let state: NetState = envelope.take(instance)?;
        state.check(self.parameters)?;
        self.active_pairs = state.active_pairs;
        self.announcer
            .begin()
            .map_err(|error| DeviceError::Host(HostError::from(error)))
    }

    fn describe(&self) -> Description {
        Description {
            parameters: self.parameters.to_bytes(),
            ..Description::of::<NetState>(self.features())
        }
    }

    fn host_backend(&self) -> Option<Arc<dyn HostBackend>> {
        None
    }

    fn metrics(&self) -> Arc<dyn Counters> {
        self.metrics.clone()
    }
}
