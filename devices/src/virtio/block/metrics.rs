//! What a disk counts.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::metrics::counters;

counters! {
    /// Requests that were done, requests that failed, and their bytes.
    BlockMetrics {
        /// Requests to read.
        reads,
        /// Bytes read.
        read_bytes,
        /// Requests to write.
        writes,
        /// Bytes written.
        written_bytes,
        /// Requests to make writes durable.
        flushes,
        /// Requests to discard.
        discards,
        /// Bytes discarded.
        discarded_bytes,
        /// Requests to write zeroes.
        zeroes,
        /// Bytes zeroed.
        zeroed_bytes,
        /// Requests that were answered with an error, or not at all.
        failed,
        /// How often a request had to wait for a rate limit.
        throttled,
    }
}

impl BlockMetrics {
    /// Counts a request that was done: its type ([`super::request::BlockRequest::kind`]) and its bytes.
    pub(super) fn count_done(&self, kind: u32, bytes: u64) {
        let (requests, sum) = match kind {
            VIRTIO_BLK_T_IN => (&self.reads, Some(&self.read_bytes)),
            VIRTIO_BLK_T_OUT => (&self.writes, Some(&self.written_bytes)),
            VIRTIO_BLK_T_FLUSH => (&self.flushes, None),
            VIRTIO_BLK_T_DISCARD => (&self.discards, Some(&self.discarded_bytes)),
            VIRTIO_BLK_T_WRITE_ZEROES => (&self.zeroes, Some(&self.zeroed_bytes)),
            _ => return,
        };
        requests.add(1);
        if let Some(sum) = sum {
            sum.add(bytes);
        }
    }
}
