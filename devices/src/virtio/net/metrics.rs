//! What a network card counts.

use crate::metrics::counters;

counters! {
    /// Packets as the guest sees them: those that it receives (rx) and those that it sends (tx).
    NetMetrics {
        /// Packets that the guest got.
        rx_packets,
        /// Their bytes, without the header of virtio.
        rx_bytes,
        /// How often a read of the tap failed, or the guest's buffers for packets were malformed.
        rx_failed,
        /// How often a rate limit kept the device from reading the tap, with or without a packet in it.
        rx_throttled,
        /// Packets that the tap took.
        tx_packets,
        /// Their bytes, without the header of virtio.
        tx_bytes,
        /// Packets that were dropped: the tap did not take them, or they were malformed.
        tx_dropped,
        /// How often packets had to wait in the guest's queue for a rate limit.
        tx_throttled,
        /// Commands of the driver that were carried out.
        commands,
    }
}
