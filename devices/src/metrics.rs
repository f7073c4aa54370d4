//! Counters of devices, which any thread may read at any time without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that grows, from 0 at the start of the process.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// The current value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }
}

/// A set of counters, each with its name.
pub trait Counters: Send + Sync {
    /// The names and current values.
    fn read(&self) -> Vec<(&'static str, u64)>;
}

/// Defines a set of counters that go by the names of their fields.
macro_rules! counters {
    ($(#[$about:meta])* $set:ident { $($(#[$what:meta])* $counter:ident,)+ }) => {
        $(#[$about])*
        #[derive(Debug, Default)]
        pub struct $set {
            $($(#[$what])* pub $counter: $crate::metrics::Counter,)+
        }

        impl $crate::metrics::Counters for $set {
            fn read(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($counter), self.$counter.get()),)+]
            }
        }
    };
}

pub(crate) use counters;
