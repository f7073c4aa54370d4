//! The device: packets between one pair of queues and a tap, on the device thread.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use migration_state::Envelope;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use super::Parameters;
use super::announce::{Announcer, rarp};
use super::control::{Command, answer};
use super::receive::{Layout, receive};
use super::state::NetState;
use super::tap::{Tap, TapError};
use super::transmit::send;
use crate::limited::Limited;
use crate::virtio::device::{RING_FEATURES, read_bytes};
use crate::virtio::{
    Description, DeviceError, HostBackend, HostError, Progress, QUEUE_SIZE, QueueError, Queues, VirtioDevice,
};

pub(super) const RECEIVE: usize = 0;
pub(super) const TRANSMIT: usize = 1;
pub(super) const CONTROL: usize = 2;

/// Features that do not depend on the tap.
const FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | GUEST_ANNOUNCE;
const GUEST_ANNOUNCE: u64 = 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;

const LINK_UP: u16 = VIRTIO_NET_S_LINK_UP as u16;
const ANNOUNCE: u16 = VIRTIO_NET_S_ANNOUNCE as u16;
/// Address at 0, status at 6, the number of queue pairs (not offered) at 8, MTU at 10.
const CONFIG_LEN: usize = 12;

/// A network card. After a restore it tells the network where it is now, and has the guest do so.
#[derive(Debug)]
pub struct Net {
    tap: Tap,
    parameters: Parameters,
    /// What the driver accepted.
    features: u64,
    /// The guest is to announce itself and has not yet said that it heard so (virtio 1.2, 5.1.6.5.4).
    announce: bool,
    announcer: Announcer,
    complaints: Limited,
}

impl Net {
    /// A card on `tap`, whose packets must not be smaller than the card's.
    pub fn new(tap: Tap, parameters: Parameters) -> Result<Self, TapError> {
        if tap.mtu() < parameters.mtu {
            return Err(TapError::Mtu {
                tap: tap.name().into(),
                expected: parameters.mtu,
                got: tap.mtu(),
            });
        }
        let announcer = Announcer::new().map_err(|source| TapError::Io {
            tap: tap.name().into(),
            what: "make a timer for its announcements",
            source,
        })?;
        Ok(Self {
            tap,
            parameters,
            features: 0,
            announce: false,
            announcer,
            complaints: Limited::default(),
        })
    }

    fn receive(&self, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        let Some(mut queue) = queues.get(RECEIVE) else {
            return Ok(Progress::Idle);
        };
        let layout = Layout::new(self.features, self.parameters.mtu);
        receive(&mut queue, &self.tap, layout, |error| {
            self.complain("packet to the guest", error);
        })
    }

    fn transmit(&self, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        let Some(mut queue) = queues.get(TRANSMIT) else {
            return Ok(Progress::Idle);
        };
        queue.serve(|memory, chain| {
            if let Err(error) = send(memory, chain, &self.tap) {
                self.complain("packet of the guest", &error);
            }
            0
        })
    }

    fn control(&mut self, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        let Some(mut queue) = queues.get(CONTROL) else {
            return Ok(Progress::Idle);
        };
        queue.serve(|memory, chain| {
            let (command, written) = answer(memory, chain);
            match command {
                Ok(Command::AnnounceAck) => self.announce = false,
                Err(error) => self.complain("control queue", &error),
            }
            written
        })
    }

    /// Announces the guest if it is time to. It is asked to do so itself once: it sees to it that it is heard.
    fn announce(&mut self, queues: &Queues<'_>) {
        let round = match self.announcer.due() {
            Ok(Some(round)) => round,
            Ok(None) => return,
            Err(error) => return self.complain("announcement", &error),
        };
        if let Err(error) = self.tap.write(&rarp(self.parameters.mac)) {
            self.complain("announcement", &error);
        }
        if round == 0 && self.features & GUEST_ANNOUNCE != 0 {
            self.announce = true;
            queues.config_changed();
        }
    }

    fn complain(&self, what: &str, error: &dyn std::error::Error) {
        if let Some(count) = self.complaints.count() {
            let tap = self.tap.name();
            tracing::warn!(tap, count, "virtio-net: {what}: {error}");
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        RING_FEATURES | FEATURES | self.tap.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = LINK_UP | if self.announce { ANNOUNCE } else { 0 };
        let mut config = [0; CONFIG_LEN];
        config[..6].copy_from_slice(&self.parameters.mac.bytes());
        config[6..8].copy_from_slice(&status.to_le_bytes());
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
        if let Err(error) = self.tap.set_features(features) {
            self.complain("offloads", &error);
        }
    }

    fn process_queue(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        match index {
            RECEIVE => self.receive(queues),
            TRANSMIT => self.transmit(queues),
            CONTROL => self.control(queues),
            _ => Ok(Progress::Idle),
        }
    }

    fn host_events(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.tap.as_fd(), self.announcer.as_fd()]
    }

    fn process_host(&mut self, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        self.announce(queues);
        self.receive(queues)
    }

    fn reset(&mut self) {
        self.features = 0;
        self.announce = false;
        if let Err(error) = self.announcer.stop() {
            self.complain("announcement", &error);
        }
        if let Err(error) = self.tap.set_features(0) {
            self.complain("offloads", &error);
        }
    }

    /// Packets are on their way when they are taken; nothing is ever in flight.
    fn drain(&mut self, _: &mut Queues<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let Parameters { mac, mtu } = self.parameters;
        Ok(envelope.put(instance, &NetState { mac, mtu })?)
    }

    fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let state: NetState = envelope.take(instance)?;
        state.check(self.parameters)?;
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
}
