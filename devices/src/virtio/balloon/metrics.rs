//! What a balloon counts.

use crate::metrics::counters;

counters! {
    /// Memory that came and went.
    BalloonMetrics {
        /// Bytes that the guest put into the balloon.
        inflated_bytes,
        /// Bytes that the guest took out of it.
        deflated_bytes,
        /// Bytes that the guest said it does not use at the moment.
        reported_bytes,
        /// Bytes that went back to the host, of either kind.
        discarded_bytes,
    }
}
