//! What a balloon counts.

use crate::metrics::counters;

counters! {
    /// Memory that moved between guest and host.
    BalloonMetrics {
        /// Bytes that the guest put into the balloon.
        inflated_bytes,
        /// Bytes that the guest took out of it.
        deflated_bytes,
        /// Bytes that the guest reported as not used at the moment.
        reported_bytes,
        /// Bytes that were given back to the host, for either reason.
        discarded_bytes,
    }
}
