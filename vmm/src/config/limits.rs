//! Rate limits as Firecracker's clients write them, in the configuration file and over the API.

use api::{RateLimiter, TokenBucket};
use devices::{Bucket, Limits};

/// `limiter`'s limits where it says something, else `before`.
pub(crate) fn updated_limits(limiter: RateLimiter, before: Limits) -> Limits {
    let bucket = |asked: Option<TokenBucket>, before| match asked {
        None => before,
        Some(TokenBucket { size: 0, .. }) => None,
        Some(bucket) => Some(Bucket {
            size: bucket.size,
            one_time_burst: bucket.one_time_burst,
            refill_time_ms: bucket.refill_time,
        }),
    };
    Limits {
        bandwidth: bucket(limiter.bandwidth, before.bandwidth),
        operations: bucket(limiter.ops, before.operations),
    }
}
