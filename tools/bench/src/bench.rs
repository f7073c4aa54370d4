//! What all experiments share: the programs, the sentinel, repetitions, and every move that was made.

use std::time::{Duration, Instant};

use anyhow::Result;
use migration::Report;
use tests::Fixtures;

use crate::godwit::{Asked, Godwit, MigrationEnd};
use crate::sentinel::{Sentinel, Window};

/// How often one run may be repeated because the host stalled.
const REPEATS: u32 = 2;
/// Time for the repetitions of one experiment, for each run that a quick look asks for.
const QUICK_SPARE_SECONDS: u32 = 5;

/// One bench.
pub(crate) struct Bench {
    /// godwit and the guests.
    pub(crate) fixtures: Fixtures,
    /// The reports of all moves, for the rows about predictions.
    pub(crate) moves: Vec<Report>,
    sentinel: Sentinel,
    count: Option<u32>,
    stalled: u32,
    repeated: u32,
    spare: Duration,
}

impl Bench {
    /// `count`: repetitions of everything, instead of as many as each row promises.
    pub(crate) fn new(fixtures: Fixtures, count: Option<u32>) -> Result<Self> {
        let sentinel = Sentinel::start()?;
        Ok(Self {
            fixtures,
            moves: Vec::new(),
            sentinel,
            count,
            stalled: 0,
            repeated: 0,
            spare: Duration::ZERO,
        })
    }

    /// Another experiment begins, with so many seconds for repetitions: a host that stalls all the time must not
    /// make the bench endless.
    pub(crate) fn begin(&mut self, spare_seconds: u32) {
        let quick = self.count.map(|count| count.saturating_mul(QUICK_SPARE_SECONDS));
        let seconds = quick.map_or(spare_seconds, |quick| quick.min(spare_seconds));
        self.spare = Duration::from_secs(seconds.into());
    }

    /// How often to measure what shall be measured `promised` times.
    pub(crate) fn count(&self, promised: u32) -> u32 {
        self.count.unwrap_or(promised).max(1)
    }

    /// Measures once, and again if the host stalled meanwhile. `run` returns when it measured as well.
    pub(crate) fn clean<T>(
        &mut self,
        what: &str,
        run: impl FnMut(&mut Self) -> Result<(T, Window)>,
    ) -> Result<T> {
        self.clean_unless(what, |_| false, run)
    }

    /// As [`Bench::clean`], but what is `good` in spite of a stall is not repeated.
    fn clean_unless<T>(
        &mut self,
        what: &str,
        good: impl Fn(&T) -> bool,
        mut run: impl FnMut(&mut Self) -> Result<(T, Window)>,
    ) -> Result<T> {
        let mut attempt = 0;
        loop {
            let began = Instant::now();
            let (value, window) = run(self)?;
            let took = began.elapsed();
            let stalls = self.sentinel.within(window);
            let Some(longest) = stalls.iter().max_by_key(|stall| stall.lasted) else {
                return Ok(value);
            };
            self.stalled += 1;
            let again = !good(&value) && attempt < REPEATS && took <= self.spare;
            print_status(format_args!(
                "{what}: the host stalled {} times, for {:.1} ms on CPU {} at the longest; the run {}",
                stalls.len(),
                longest.lasted.as_secs_f64() * 1e3,
                longest.cpu,
                if again {
                    "is repeated"
                } else {
                    "counts nevertheless"
                }
            ));
            if !again {
                return Ok(value);
            }
            attempt += 1;
            self.repeated += 1;
            self.spare = self.spare.saturating_sub(took);
        }
    }

    /// Moves a guest, again if the host stalled meanwhile, and keeps the report.
    pub(crate) fn hop(&mut self, what: &str, godwit: &mut Godwit, asked: &Asked<'_>) -> Result<MigrationEnd> {
        let good = |ended: &MigrationEnd| asked.promise && ended.moved && ended.report.budget_kept;
        let ended = self.clean_unless(what, good, |_| {
            let ended = godwit.hop(asked)?;
            print_status(format_args!("{what}: {}", ended.summary()));
            let window = ended.window;
            Ok((ended, window))
        })?;
        if ended.moved {
            self.moves.push(ended.report.clone());
        }
        Ok(ended)
    }

    /// The stalls that the sentinel found, in one line.
    pub(crate) fn stalls(&self) -> String {
        format!(
            "the host stalled {} times for more than 2 ms; {} runs were touched, {} were repeated",
            self.sentinel.count(),
            self.stalled,
            self.repeated
        )
    }
}

/// Prints on stderr how far the bench is.
pub(crate) fn print_status(what: impl std::fmt::Display) {
    eprintln!("bench: {what}");
}
