//! What a socket device counts.

use super::packet::PacketOp;
use crate::metrics::counters;

counters! {
    /// Packets as the guest sees them: those that it receives (rx) and those that it sends (tx).
    VsockMetrics {
        /// Connections that were made, by either side.
        connections,
        /// Packets that the guest got.
        rx_packets,
        /// Bytes of data in them.
        rx_bytes,
        /// How often packets for the guest had to wait for a rate limit.
        rx_throttled,
        /// Packets that the guest sent.
        tx_packets,
        /// Bytes of data in them.
        tx_bytes,
        /// How often packets of the guest had to wait in its queue for a rate limit.
        tx_throttled,
        /// Packets of either side that end or refuse a connection at once.
        resets,
        /// Connections that programs on the host asked for and the guest did not answer in time.
        unanswered,
    }
}

impl VsockMetrics {
    /// Counts a packet that the guest got, with so many bytes of data.
    pub(super) fn received(&self, op: Option<PacketOp>, bytes: u64) {
        self.rx_packets.add(1);
        self.rx_bytes.add(bytes);
        self.count_reset(op);
    }

    /// Counts a packet that the guest sent, with so many bytes of data.
    pub(super) fn sent(&self, op: Option<PacketOp>, bytes: u64) {
        self.tx_packets.add(1);
        self.tx_bytes.add(bytes);
        self.count_reset(op);
    }

    fn count_reset(&self, op: Option<PacketOp>) {
        if op == Some(PacketOp::Reset) {
            self.resets.add(1);
        }
    }
}
