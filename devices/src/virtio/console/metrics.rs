//! What a console device counts.

use crate::metrics::counters;

counters! {
    /// Bytes as the guest sees them, of the console and of all ports: those that it receives (rx) and those that it
    /// sends (tx).
    ConsoleMetrics {
        /// Bytes that the guest got.
        rx_bytes,
        /// Bytes that the host took from the guest.
        tx_bytes,
        /// Programs of the host that were connected to a port.
        connections,
    }
}
