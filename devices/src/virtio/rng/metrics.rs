//! What the entropy device counts.

use crate::metrics::counters;

counters! {
    /// Random bytes that the guest got.
    RngMetrics {
        /// Requests.
        requests,
        /// Bytes.
        bytes,
        /// How often requests had to wait for a rate limit.
        throttled,
    }
}
