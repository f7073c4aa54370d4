//! Bounds how many lines each place in the program writes: strangers who connect and guests can provoke some of them,
//! as often as they like.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tracing::callsite::Identifier;
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::Allowance;
use super::lines::Lines;

/// Lines that one place may write at once.
const BURST: u64 = 100;
/// And in each second from there on.
const PER_SECOND: u64 = 10;

/// Lets each place in the program write so many lines, and has the others counted.
pub(super) struct Damping {
    places: Mutex<HashMap<Identifier, Allowance>>,
    lines: Lines,
}

impl Damping {
    pub(super) fn new(lines: Lines) -> Self {
        Self {
            places: Mutex::default(),
            lines,
        }
    }

    fn admits(&self, place: Identifier, now: Instant) -> bool {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let allowance = places
            .entry(place)
            .or_insert_with(|| Allowance::new(BURST, PER_SECOND, now));
        allowance.take(1, now) == 1
    }
}

impl<S: Subscriber> Layer<S> for Damping {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let admitted = self.admits(event.metadata().callsite(), Instant::now());
        if !admitted {
            self.lines.leave_out();
        }
        admitted
    }
}
