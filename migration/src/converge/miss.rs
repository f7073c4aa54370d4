//! Why the promise cannot be kept, in numbers.

use std::fmt;
use std::time::Duration;

/// A promise that cannot be kept. Rates in bytes per second.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Miss {
    /// What stands in the way.
    pub reason: Reason,
    /// The downtime that was promised.
    pub max_downtime: Duration,
    /// The total time that was promised.
    pub deadline: Option<Duration>,
    /// When it became clear, since the start.
    pub at: Duration,
    /// The bandwidth that would do; `None` where none would.
    pub needed_bandwidth: Option<f64>,
    /// The bandwidth that there is.
    pub bandwidth: f64,
    /// What the guest newly dirties per second; where it dirties again all that is sent, it may be more.
    pub dirty_rate: f64,
    /// The downtime that could be kept.
    pub attainable_downtime: Duration,
    /// The total time that could be kept, where it can be told.
    pub attainable_total: Option<Duration>,
    /// Whether the guest was allowed to be slowed down.
    pub throttle: bool,
}

/// What stands in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The downtime is too long even without a dirty page.
    Costs,
    /// The guest dirties pages faster than they can be sent.
    DirtyRate,
    /// There is too much to send before the deadline.
    Deadline,
    /// The rounds are used up.
    Rounds,
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (max_downtime, kept) = (
            DurationText(self.max_downtime),
            DurationText(self.attainable_downtime),
        );
        let (bandwidth, dirty) = (RateText(self.bandwidth), RateText(self.dirty_rate));
        let slowed = if self.throttle {
            " although it was slowed down as far as allowed"
        } else {
            ""
        };
        match self.reason {
            Reason::Costs => write!(
                f,
                "a downtime of {max_downtime} cannot be kept: to pause, save and restore the machine, and to send \
                 what it writes until it stands still, takes {kept}; allow at least that"
            ),
            Reason::DirtyRate => write!(
                f,
                "a downtime of {max_downtime} cannot be kept: the guest dirties {dirty}{slowed} and the link \
                 carries {bandwidth}"
            ),
            Reason::Deadline => write!(
                f,
                "the deadline of {} cannot be kept with a downtime of {max_downtime}: the link carries \
                 {bandwidth} and the guest dirties {dirty}",
                DurationText(self.deadline.unwrap_or_default())
            ),
            Reason::Rounds => write!(
                f,
                "a downtime of {max_downtime} was not reached in the rounds allowed: the guest dirties {dirty} and \
                 the link carries {bandwidth}"
            ),
        }?;
        if self.reason == Reason::Costs {
            return Ok(());
        }
        if let Some(needed) = self.needed_bandwidth {
            write!(f, "; it takes {}", RateText(needed))?;
        }
        if let Some(total) = self.attainable_total {
            write!(f, ", or {} of total time", DurationText(total))?;
        }
        write!(f, ", or a downtime of {kept}")?;
        let slow_down = !self.throttle && self.reason == Reason::DirtyRate;
        f.write_str(if slow_down {
            ", or leave to slow the guest down"
        } else {
            ""
        })
    }
}

/// Bytes per second, for people.
struct RateText(f64);

impl fmt::Display for RateText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            rate if rate >= 1e9 => write!(f, "{:.1} GB/s", rate / 1e9),
            rate if rate >= 1e7 => write!(f, "{:.0} MB/s", rate / 1e6),
            rate => write!(f, "{:.2} MB/s", rate / 1e6),
        }
    }
}

/// A duration, for people.
struct DurationText(Duration);

impl fmt::Display for DurationText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs_f64() {
            s if s >= 1.0 => write!(f, "{s:.1} s"),
            s if s >= 0.01 => write!(f, "{:.0} ms", s * 1e3),
            s => write!(f, "{:.1} ms", s * 1e3),
        }
    }
}
