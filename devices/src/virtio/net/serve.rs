//! How a network card serves its queues: packets from and to the tap, and the driver's commands.

use std::io;

use super::HEADER_LEN;
use super::announce::rarp;
use super::control::{NetCommand, NetCommandError, process_command};
use super::device::{GUEST_ANNOUNCE, MQ, QUEUES_OF_A_PAIR, RECEIVE, TRANSMIT, VirtioNet};
use super::receive::{ReceiveLayout, receive_packets};
use super::transmit::send_packet;
use crate::virtio::{QueueError, QueueProgress, Queues};

impl VirtioNet {
    /// The number of the control queue, which follows the last pair that the driver knows of.
    pub(super) fn control_queue(&self) -> usize {
        let pairs = if self.features & MQ != 0 {
            self.parameters.queue_pairs
        } else {
            1
        };
        QUEUES_OF_A_PAIR * usize::from(pairs)
    }

    /// The first `pairs`, in the order of this turn.
    fn in_turn(&self, pairs: u16) -> impl Iterator<Item = usize> + use<> {
        let (turn, pairs) = (self.turn, usize::from(pairs));
        (0..pairs).map(move |offset| turn.wrapping_add(offset) % pairs)
    }

    /// Reads packets for the guest, for each pair in use. A pair that has more packets ends the turn.
    pub(super) fn process_receive_queues(
        &self,
        queues: &mut Queues<'_>,
    ) -> Result<QueueProgress, QueueError> {
        for pair in self.in_turn(self.active_pairs) {
            if self.process_receive_queue(pair, queues)? == QueueProgress::More {
                return Ok(QueueProgress::More);
            }
        }
        Ok(QueueProgress::Idle)
    }

    pub(super) fn process_receive_queue(
        &self,
        pair: usize,
        queues: &mut Queues<'_>,
    ) -> Result<QueueProgress, QueueError> {
        // The device must not fill buffers of a pair that the driver does not use.
        if pair >= self.active_pairs.into() {
            return Ok(QueueProgress::Idle);
        }
        let Some(mut queue) = queues.get(QUEUES_OF_A_PAIR * pair + RECEIVE) else {
            return Ok(QueueProgress::Idle);
        };
        let layout = ReceiveLayout::new(self.features, self.parameters.mtu);
        let (tap, limiter) = (self.tap.queue(pair), &self.rx_limiter);
        receive_packets(&mut queue, tap, layout, limiter, &self.metrics, |error| {
            self.metrics.rx_failed.add(1);
            self.warn("packet to the guest", error);
        })
    }

    /// Sends the packets that waited for tokens.
    pub(super) fn process_transmit_queues(
        &self,
        queues: &mut Queues<'_>,
    ) -> Result<QueueProgress, QueueError> {
        let mut progress = QueueProgress::Idle;
        for pair in self.in_turn(self.parameters.queue_pairs) {
            if self.process_transmit_queue(pair, queues)? == QueueProgress::More {
                progress = QueueProgress::More;
            }
        }
        Ok(progress)
    }

    pub(super) fn process_transmit_queue(
        &self,
        pair: usize,
        queues: &mut Queues<'_>,
    ) -> Result<QueueProgress, QueueError> {
        let Some(mut queue) = queues.get(QUEUES_OF_A_PAIR * pair + TRANSMIT) else {
            return Ok(QueueProgress::Idle);
        };
        // Packets left in a queue that the driver no longer uses go out as well.
        let tap = self.tap.queue(pair);
        queue.serve_admitted(
            |bytes| self.admit_transmit(bytes),
            |memory, chain| {
                match send_packet(memory, chain, tap) {
                    Ok(bytes) => {
                        self.metrics.tx_packets.add(1);
                        self.metrics.tx_bytes.add(bytes);
                    }
                    Err(error) => {
                        self.metrics.tx_dropped.add(1);
                        self.warn("packet of the guest", &error);
                    }
                }
                0
            },
        )
    }

    fn admit_transmit(&self, bytes: u64) -> bool {
        let admitted = self
            .tx_limiter
            .try_consume(bytes.saturating_sub(HEADER_LEN as u64));
        if !admitted {
            self.metrics.tx_throttled.add(1);
        }
        admitted
    }

    /// Serves one command a turn, and [`super::device::COMMANDS`] a second.
    pub(super) fn process_control_queue(
        &mut self,
        queues: &mut Queues<'_>,
    ) -> Result<QueueProgress, QueueError> {
        let Some(mut queue) = queues.get(self.control_queue()) else {
            return Ok(QueueProgress::Idle);
        };
        let Some((head, chain)) = queue.pop()? else {
            return Ok(QueueProgress::Idle);
        };
        if !self.command_limiter.try_consume(0) {
            queue.undo_pop();
            return Ok(QueueProgress::Idle);
        }
        let (done, written) = process_command(queue.memory(), chain, |command| self.apply_command(command));
        match done {
            Ok(()) => self.metrics.commands.add(1),
            Err(error) => self.warn("control queue", &error),
        }
        queue.add_used(head, written)?;
        queue.notify()?;
        Ok(QueueProgress::More)
    }

    fn apply_command(&mut self, command: NetCommand) -> Result<(), NetCommandError> {
        match command {
            NetCommand::AnnounceAck => self.announce_pending = false,
            NetCommand::QueuePairs(got) => {
                let most = if self.features & MQ != 0 {
                    self.parameters.queue_pairs
                } else {
                    0
                };
                if !(1..=most).contains(&got) {
                    return Err(NetCommandError::QueuePairs { most, got });
                }
                self.set_active_pairs(got)?;
            }
        }
        Ok(())
    }

    /// Makes `pairs` the pairs in use; if the tap cannot, the old number stays.
    pub(super) fn set_active_pairs(&mut self, pairs: u16) -> io::Result<()> {
        let set = self.tap.set_active(pairs);
        if set.is_ok() {
            self.active_pairs = pairs;
        } else if let Err(error) = self.tap.set_active(self.active_pairs) {
            self.warn("queues", &error);
        }
        set
    }

    /// Announces the guest if a round is due. In the first round the guest is also asked to announce itself, once: its
    /// driver repeats that until its network has it.
    pub(super) fn send_announcement(&mut self, queues: &Queues<'_>) {
        let round = match self.announcer.due() {
            Ok(Some(round)) => round,
            Ok(None) => return,
            Err(error) => return self.warn("announcement", &error),
        };
        if let Err(error) = self.tap.write(&rarp(self.parameters.mac)) {
            self.warn("announcement", &error);
        }
        if round == 0 && self.features & GUEST_ANNOUNCE != 0 {
            self.announce_pending = true;
            queues.config_changed();
        }
    }

    pub(super) fn warn(&self, what: &str, error: &dyn std::error::Error) {
        if let Some(count) = self.warnings.count() {
            let tap = self.tap.name();
            tracing::warn!(tap, count, "virtio-net: {what}: {error}");
        }
    }
}
