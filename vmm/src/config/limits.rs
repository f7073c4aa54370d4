//! Rate limits as Firecracker's clients write them, in the configuration file and over the API.

use api::{RateLimiter, TokenBucket};
use devices::{Bucket, Limits};

/// The limits that `limiter` sets, and those of `before` where it sets none. A bucket of size 0 removes a limit.
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
