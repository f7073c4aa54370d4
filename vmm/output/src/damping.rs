//! Bounds how many lines each place in the program writes: strangers who connect and guests can provoke some of them,
//! as often as they like.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::Allowance;
use super::lines::Lines;

/// Lines that one place may write at once.
const BURST: u64 = 100;
/// And in each second from there on.
const PER_SECOND: u64 = 10;

/// Lets each place in the program write a limited number of lines, and counts the others.
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
        allowance.spend(1, now) == 1
    }
}

impl<S: Subscriber> Layer<S> for Damping {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        // What is traced was asked for by name, and is of no use with gaps.
        let admitted = *event.metadata().level() == Level::TRACE
            || self.admits(event.metadata().callsite(), Instant::now());
        if !admitted {
            self.lines.leave_out();
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{self, BufRead, BufReader};
    use std::os::fd::OwnedFd;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;
    use crate::Descriptor;
    use crate::log::EventWriter;

    #[test]
    fn one_place_cannot_flood_the_log_and_others_still_log() {
        let (reader, writer) = io::pipe().unwrap();
        let to = Descriptor::File(File::from(OwnedFd::from(writer)));
        let lines = Lines::start("log", to).unwrap();
        let layer = tracing_subscriber::fmt::layer().with_writer(EventWriter(lines.clone()));
        let subscriber = tracing_subscriber::registry()
            .with(layer)
            .with(Damping::new(lines));
        let began = Instant::now();
        tracing::subscriber::with_default(subscriber, || {
            for number in 0..10_000 {
                tracing::debug!(number, "a guest writes where it may not");
            }
            tracing::debug!("another place");
        });
        let most = BURST + PER_SECOND * (began.elapsed().as_secs() + 1);
        let mut flood = 0;
        let mut read = BufReader::new(reader).lines().map(Result::unwrap);
        let mut seen = [false, false];
        while seen != [true, true] {
            let line = read.next().unwrap();
            flood += u64::from(line.contains("a guest writes"));
            seen[0] |= line.contains("another place");
            seen[1] |= line.contains("log lines were left out");
        }
        assert!((BURST..=most).contains(&flood), "{flood} lines");
    }
}
