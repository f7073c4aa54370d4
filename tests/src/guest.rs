//! What guests print: one event a line, `bare: name key=value…` and `agent: name key=value…`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestEvent {
    /// `bare` or `agent`.
    pub guest: String,
    /// E.g. `tick`.
    pub name: String,
    fields: BTreeMap<String, String>,
    line: String,
}

impl GuestEvent {
    /// The event of a line; `None` if it is something else, say a kernel message.
    pub fn parse(line: &str) -> Option<Self> {
        let guest = ["bare", "agent"].into_iter().find(|guest| {
            line.strip_prefix(guest)
                .is_some_and(|rest| rest.starts_with(": "))
        })?;
        let mut words = line[guest.len() + 2..].split_whitespace();
        let name = words.next()?.to_owned();
        let fields = words.filter_map(|word| word.split_once('='));
        let fields = fields
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Some(Self {
            guest: guest.into(),
            name,
            fields,
            line: line.into(),
        })
    }

    /// That event, if the line is one of this name.
    pub fn named(line: &str, name: &str) -> Option<Self> {
        Self::parse(line).filter(|event| event.name == name)
    }

    /// A field that is a number.
    pub fn number(&self, key: &str) -> Result<u64> {
        let value = self
            .fields
            .get(key)
            .with_context(|| format!("{:?} has no {key}", self.line))?;
        value
            .parse()
            .with_context(|| format!("{:?}: {key} is no number", self.line))
    }
}

/// A heartbeat of either guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// The counter.
    pub n: u64,
    /// The guest's monotonic clock in microseconds.
    pub us: u64,
    /// The longest gap that it saw in its own loop, in microseconds.
    pub max_gap_us: u64,
    /// Pages dirtied so far.
    pub pages: u64,
    /// Errors so far.
    pub errors: u64,
}

impl Tick {
    /// The heartbeat of a line; `None` if the line is something else or not whole.
    pub fn parse(line: &str) -> Option<Self> {
        let event = GuestEvent::named(line, "tick")?;
        let us = event.number("us").or_else(|_| event.number("mono_us")).ok()?;
        let number = |key| event.number(key).ok();
        Some(Self {
            n: number("n")?,
            us,
            max_gap_us: number("max_gap_us")?,
            pages: number("pages")?,
            errors: number("errors")?,
        })
    }
}

/// Checks a guest's whole life, the output of all its hosts one after the other: no error, no fault, clocks and
/// counters that only go forward. `step`: by how much the counter goes on from line to line, if it is constant.
pub fn check_ticks(text: &str, step: Option<u64>) -> Result<u64> {
    let mut last: Option<Tick> = None;
    for line in text.lines() {
        let Some(event) = GuestEvent::parse(line) else {
            continue;
        };
        ensure!(
            !["error", "fault"].contains(&event.name.as_str()),
            "the guest says {line:?}"
        );
        if event.name != "tick" {
            continue;
        }
        let tick = Tick::parse(line).with_context(|| format!("expected a whole tick, got {line:?}"))?;
        ensure!(tick.errors == 0, "the guest counts errors: {line:?}");
        if let Some(last) = last {
            let steps = tick
                .n
                .checked_sub(last.n)
                .with_context(|| format!("the counter fell from {} in {line:?}", last.n))?;
            let right = step.map_or(steps > 0, |step| steps == step);
            ensure!(right, "the counter went from {} to {}", last.n, tick.n);
            ensure!(
                tick.us > last.us,
                "the clock went from {} to {} µs",
                last.us,
                tick.us
            );
        }
        last = Some(tick);
    }
    last.map(|tick| tick.n).context("the guest never ticked")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "bare: tick n=1 us=50000 max_gap_us=12 pages=9 errors=0";
    const TWO: &str = "bare: tick n=2 us=100000 max_gap_us=12 pages=19 errors=0";

    #[test]
    fn ticks_of_both_guests() {
        let tick = Tick::parse(ONE).unwrap();
        assert_eq!(
            tick,
            Tick {
                n: 1,
                us: 50_000,
                max_gap_us: 12,
                pages: 9,
                errors: 0
            }
        );
        let agent =
            Tick::parse("agent: tick n=7 mono_us=5 real_us=6 max_gap_us=1 pages=2 errors=0 files=3").unwrap();
        assert_eq!((agent.n, agent.us), (7, 5));
        assert_eq!(Tick::parse("bare: tick n=1 us=5"), None);
        assert_eq!(GuestEvent::parse("barely: tick n=1"), None);
    }

    #[test]
    fn a_life_without_a_break() {
        assert_eq!(
            check_ticks(&format!("noise\n{ONE}\n{TWO}\n"), Some(1)).unwrap(),
            2
        );
    }

    #[test]
    fn breaks_are_found() {
        let skipped = TWO.replace("n=2", "n=3");
        let backwards = TWO.replace("us=100000", "us=40000");
        let wrong = TWO.replace("errors=0", "errors=1");
        let lost = TWO.replace(" pages=19", "");
        for second in [
            ONE,
            &skipped,
            &backwards,
            &wrong,
            &lost,
            "bare: error page=3",
            "bare: fault vector=6",
        ] {
            assert!(
                check_ticks(&format!("{ONE}\n{second}"), Some(1)).is_err(),
                "{second}"
            );
        }
        check_ticks(&format!("{ONE}\n{skipped}"), None).unwrap();
        assert!(check_ticks("", None).is_err());
    }
}
