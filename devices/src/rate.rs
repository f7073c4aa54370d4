//! Rate limits of devices: token buckets for operations and for bytes, as Firecracker has them. After a restore the
//! buckets are full.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::timer::Timer;

/// A token bucket: at most `size` tokens, which come back evenly within the refill time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// Most tokens in the bucket, and how many there are at first.
    pub size: u64,
    /// Tokens that are there at first besides, and do not come back.
    pub one_time_burst: u64,
    /// How long it takes to fill the empty bucket, in milliseconds.
    pub refill_time_ms: u64,
}

/// A device's rate limits. Without a bucket there is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// A token for each byte.
    pub bandwidth: Option<Bucket>,
    /// A token for each operation.
    pub operations: Option<Bucket>,
}

/// A bucket without a size or a refill time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rate limit: expected a size and a refill time above 0, got {} and {} ms", .0.size, .0.refill_time_ms)]
pub struct BucketError(pub Bucket);

/// The state of a device's rate limits.
#[derive(Debug)]
pub(crate) struct Limiter {
    // Cells, as a device consumes tokens while its queues are borrowed.
    bandwidth: Cell<Option<Tokens>>,
    operations: Cell<Option<Tokens>>,
    /// Goes off when there are tokens again, if a request had to wait for them.
    timer: Timer,
}

/// The tokens of a bucket. If there is one token a request may consume as many as it needs, so that no request is too
/// large; the next request waits until the debt is paid.
#[derive(Clone, Copy, Debug)]
struct Tokens {
    bucket: Bucket,
    /// Tokens that are left; negative for a debt.
    count: f64,
    /// Tokens of the burst that are left.
    burst: u64,
    /// When `count` was computed.
    seen: Instant,
}

impl Bucket {
    /// A bucket of `tokens` a second, with a second's worth at first.
    pub fn per_second(tokens: u64) -> Self {
        Self {
            size: tokens,
            one_time_burst: 0,
            refill_time_ms: 1000,
        }
    }

    fn check(self) -> Result<(), BucketError> {
        if self.size == 0 || self.refill_time_ms == 0 {
            return Err(BucketError(self));
        }
        Ok(())
    }
}

/// Bytes of [`Limits::to_bytes`].
const LIMITS_LEN: usize = 48;

impl Limits {
    /// The limits as a part of a device's parameters; no bytes if there are no limits.
    pub fn to_bytes(&self) -> Vec<u8> {
        if *self == Self::default() {
            return Vec::new();
        }
        let numbers = |bucket: Option<Bucket>| {
            bucket.map_or([0; 3], |bucket| {
                [bucket.size, bucket.one_time_burst, bucket.refill_time_ms]
            })
        };
        let numbers = [numbers(self.bandwidth), numbers(self.operations)];
        let bytes = numbers.as_flattened().iter().map(|number| number.to_le_bytes());
        bytes.flatten().collect()
    }

    /// Parses what [`Limits::to_bytes`] made; `None` if the bytes are malformed or a bucket is not valid.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.is_empty() {
            return Some(Self::default());
        }
        let bytes: &[u8; LIMITS_LEN] = bytes.try_into().ok()?;
        let (numbers, _) = bytes.as_chunks();
        let bucket = |at: usize| {
            let number = |index: usize| u64::from_le_bytes(numbers[at + index]);
            let bucket = Bucket {
                size: number(0),
                one_time_burst: number(1),
                refill_time_ms: number(2),
            };
            ([number(0), number(1), number(2)] != [0; 3]).then_some(bucket)
        };
        let limits = Self {
            bandwidth: bucket(0),
            operations: bucket(3),
        };
        limits.check().is_ok().then_some(limits)
    }

    /// Checks that each bucket has a size and a refill time.
    pub fn check(&self) -> Result<(), BucketError> {
        [self.bandwidth, self.operations]
            .into_iter()
            .flatten()
            .try_for_each(Bucket::check)
    }
}

impl Limiter {
    /// A limiter for limits that were checked.
    pub(crate) fn new(limits: Limits) -> io::Result<Self> {
        let mut limiter = Self {
            bandwidth: Cell::new(None),
            operations: Cell::new(None),
            timer: Timer::new()?,
        };
        limiter.set(limits);
        Ok(limiter)
    }

    /// Replaces the limits by others that were checked. The buckets are full again.
    pub(crate) fn set(&mut self, limits: Limits) {
        let now = Instant::now();
        let tokens = |bucket: Option<Bucket>| Cell::new(bucket.map(|bucket| Tokens::new(bucket, now)));
        self.bandwidth = tokens(limits.bandwidth);
        self.operations = tokens(limits.operations);
    }

    /// Becomes readable when there are tokens again.
    pub(crate) fn event(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Clears the event, before the device tries again.
    pub(crate) fn clear_event(&self) {
        // The result does not matter: the device checks the tokens in any case.
        let _ = self.timer.has_gone_off();
    }

    /// Consumes the tokens of an operation of `bytes` and returns true; if there are none, sets the event for when
    /// there are.
    pub(crate) fn try_consume(&self, bytes: u64) -> bool {
        let admitted = self.has_tokens();
        if admitted {
            self.consume(bytes);
        }
        admitted
    }

    /// Whether there are tokens for an operation; if not, sets the event for when there are.
    pub(crate) fn has_tokens(&self) -> bool {
        let (mut bandwidth, mut operations) = (self.bandwidth.get(), self.operations.get());
        if bandwidth.is_none() && operations.is_none() {
            return true;
        }
        let now = Instant::now();
        let wait = [&mut bandwidth, &mut operations]
            .into_iter()
            .flatten()
            .map(|tokens| tokens.time_to_next(now))
            .max()
            .unwrap_or_default();
        self.bandwidth.set(bandwidth);
        self.operations.set(operations);
        if wait == Duration::ZERO {
            return true;
        }
        if let Err(error) = self.timer.set(wait) {
            tracing::error!(%error, "a rate limit cannot be waited for");
        }
        false
    }

    /// Consumes the tokens of an operation after it, when its bytes are known. [`Limiter::has_tokens`] has admitted it.
    pub(crate) fn consume(&self, bytes: u64) {
        consume(&self.operations, 1);
        self.consume_bytes(bytes);
    }

    /// Consumes tokens for further bytes of an operation that was admitted; the next operation waits for them.
    pub(crate) fn consume_bytes(&self, bytes: u64) {
        consume(&self.bandwidth, bytes);
    }
}

fn consume(tokens: &Cell<Option<Tokens>>, cost: u64) {
    if let Some(mut some) = tokens.get() {
        some.consume(cost);
        tokens.set(Some(some));
    }
}

impl Tokens {
    fn new(bucket: Bucket, now: Instant) -> Self {
        Self {
            bucket,
            count: bucket.size as f64,
            burst: bucket.one_time_burst,
            seen: now,
        }
    }

    /// How long until there is a token; zero if there is one.
    fn time_to_next(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.seen);
        self.seen = now;
        let per_second = self.bucket.size as f64 * 1e3 / self.bucket.refill_time_ms as f64;
        let most = self.bucket.size as f64;
        self.count = (self.count + passed.as_secs_f64() * per_second).min(most);
        if self.burst > 0 || self.count >= 1.0 {
            return Duration::ZERO;
        }
        // Within what a timer can measure, and at most a day.
        let seconds = ((1.0 - self.count) / per_second).clamp(1e-6, 86_400.0);
        Duration::from_secs_f64(seconds)
    }

    fn consume(&mut self, cost: u64) {
        let from_burst = cost.min(self.burst);
        self.burst -= from_burst;
        self.count -= (cost - from_burst) as f64;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_was_taken_comes_back_evenly() {
        let start = Instant::now();
        let mut tokens = Tokens::new(Bucket::per_second(100), start);
        assert_eq!(tokens.time_to_next(start), Duration::ZERO);
        tokens.consume(100);
        let wait = tokens.time_to_next(start);
        assert_eq!(wait.as_millis(), 10);
        assert_eq!(tokens.time_to_next(start + SECOND / 100), Duration::ZERO);
        // More than there is: afterwards the debt is waited for.
        tokens.consume(101);
        assert_eq!(tokens.time_to_next(start + SECOND / 100).as_millis(), 1010);
        // However long nothing is taken, there is no more than the bucket holds.
        tokens.time_to_next(start + 100 * SECOND);
        tokens.consume(100);
        assert!(tokens.time_to_next(start + 100 * SECOND) > Duration::ZERO);
    }

    #[test]
    fn a_burst_is_there_once() {
        let start = Instant::now();
        let bucket = Bucket {
            size: 10,
            one_time_burst: 25,
            refill_time_ms: 1000,
        };
        let mut tokens = Tokens::new(bucket, start);
        for _ in 0..7 {
            assert_eq!(tokens.time_to_next(start), Duration::ZERO);
            tokens.consume(5);
        }
        assert!(tokens.time_to_next(start) > Duration::ZERO);
        tokens.time_to_next(start + SECOND);
        tokens.consume(10);
        assert!(tokens.time_to_next(start + SECOND) > Duration::ZERO);
    }

    #[test]
    fn buckets_without_a_bottom_are_refused() {
        for (size, refill_time_ms) in [(0, 1), (1, 0)] {
            let bucket = Bucket {
                size,
                one_time_burst: 0,
                refill_time_ms,
            };
            let limits = Limits {
                operations: Some(bucket),
                ..Default::default()
            };
            let error = limits.check().unwrap_err().to_string();
            assert!(
                error.contains(&format!("got {size} and {refill_time_ms} ms")),
                "{error}"
            );
        }
        Limits::default().check().unwrap();
    }

    #[test]
    fn limits_as_bytes() {
        let limits = Limits {
            operations: Some(Bucket::per_second(7)),
            ..Default::default()
        };
        for limits in [Limits::default(), limits] {
            assert_eq!(Limits::from_bytes(&limits.to_bytes()), Some(limits));
        }
        let mut bytes = limits.to_bytes();
        assert_eq!(Limits::from_bytes(&bytes[1..]), None);
        bytes[LIMITS_LEN - 8..].fill(0);
        assert_eq!(Limits::from_bytes(&bytes), None, "no refill time");
    }

    proptest! {
        /// Over any time the rate is kept, apart from the tokens at first and the last request.
        #[test]
        fn the_rate_is_kept(
            size in 1u64..1000, refill in 1u64..5000, burst in 0u64..100,
            costs in prop::collection::vec(1u64..200, 1..200), pauses in prop::collection::vec(0u64..100, 200),
        ) {
            let start = Instant::now();
            let bucket = Bucket { size, one_time_burst: burst, refill_time_ms: refill };
            let mut tokens = Tokens::new(bucket, start);
            let (mut now, mut taken) = (start, 0);
            for (cost, pause) in costs.iter().zip(pauses) {
                now += Duration::from_millis(pause);
                let wait = tokens.time_to_next(now);
                if wait > Duration::ZERO {
                    now += wait;
                    prop_assert!(tokens.time_to_next(now) <= Duration::from_micros(2), "it does not suffice to wait");
                }
                let allowed = (size + burst) as f64 + (now - start).as_secs_f64() * 1e3 * size as f64 / refill as f64;
                prop_assert!(taken as f64 <= allowed + 1e-3 * size as f64);
                tokens.consume(*cost);
                taken += cost;
            }
        }
    }
}
