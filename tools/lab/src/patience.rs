//! How long a wait may take: longer while something goes on, and never for ever.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Signs of progress so far, of all programs that this process waits for.
static PROGRESS: AtomicU64 = AtomicU64::new(0);

/// Records a sign of progress, such as a printed line, of a program that this process waits for.
pub fn note_progress() {
    PROGRESS.fetch_add(1, Ordering::Relaxed);
}

/// How long something may take. It only costs time where something is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitLimit {
    /// In which no program shows any progress ([`note_progress`]).
    pub quiet: Duration,
    /// In all, whatever goes on meanwhile.
    pub longest: Duration,
}

impl WaitLimit {
    /// For every wait that has no limit of its own.
    pub const DEFAULT: Self = Self {
        quiet: Duration::from_secs(180),
        longest: Duration::from_secs(600),
    };

    /// Begins to wait.
    pub fn begin(self) -> Deadline {
        let now = Instant::now();
        Deadline {
            patience: self,
            end: now + self.longest,
            quiet_end: now + self.quiet,
            progress: PROGRESS.load(Ordering::Relaxed),
        }
    }
}

impl From<Duration> for WaitLimit {
    /// So long, whatever goes on.
    fn from(time: Duration) -> Self {
        Self {
            quiet: time,
            longest: time,
        }
    }
}

impl fmt::Display for WaitLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { quiet, longest } = self;
        if quiet == longest {
            return write!(f, "{longest:?}");
        }
        write!(f, "{longest:?}, or {quiet:?} in which nothing shows progress")
    }
}

/// When a wait that has begun is given up.
#[derive(Debug)]
pub struct Deadline {
    patience: WaitLimit,
    end: Instant,
    quiet_end: Instant,
    progress: u64,
}

impl Deadline {
    /// How long the next check may be waited for; `None` once the wait is given up. If a program has made
    /// progress since the last call, the quiet time begins anew.
    pub fn left(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let progress = PROGRESS.load(Ordering::Relaxed);
        if std::mem::replace(&mut self.progress, progress) != progress {
            self.quiet_end = now + self.patience.quiet;
        }
        let left = self.end.min(self.quiet_end).saturating_duration_since(now);
        (left > Duration::ZERO).then_some(left)
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;

    #[test]
    fn progress_renews_a_wait_up_to_its_end() {
        let patience = WaitLimit {
            quiet: Duration::from_secs(3600),
            longest: Duration::from_millis(50),
        };
        let mut deadline = patience.begin();
        assert!(deadline.left().unwrap() <= patience.longest);
        sleep(patience.longest);
        note_progress();
        assert_eq!(deadline.left(), None);

        // Other tests of this process may make progress at any time: only the first half can be asserted.
        let patience = WaitLimit {
            quiet: Duration::from_millis(20),
            longest: Duration::from_secs(3600),
        };
        let mut deadline = patience.begin();
        sleep(patience.quiet);
        note_progress();
        let left = deadline.left().unwrap();
        assert!(left <= patience.quiet, "{left:?}");
    }

    #[test]
    fn a_fixed_time_is_not_renewed() {
        let mut deadline = WaitLimit::from(Duration::from_millis(20)).begin();
        sleep(Duration::from_millis(20));
        note_progress();
        assert_eq!(deadline.left(), None);
    }
}
