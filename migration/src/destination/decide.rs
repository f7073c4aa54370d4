//! A machine that is ready waits for one word, from whoever has it.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::ReceiveError;
use super::job::Job;
use crate::commit::Stage;
use crate::control::Decision;
use crate::link::{Heard, Link, LinkError};
use crate::protocol::{Frame, Message};
use crate::text::chain;

/// The machine is ours.
pub(super) struct Word {
    /// When the guest stopped, on this side's clock, as far as is known.
    pub(super) stopped_at: Option<Instant>,
    /// Whether the source is still there to be told.
    pub(super) connected: bool,
}

impl Job<'_> {
    /// Waits for "go", for an operator to say "run" (then the machine is ours) or for whatever else the ledger
    /// counts (then it is given up): for as long as it takes, whether the source is there or not.
    pub(super) fn await_word(
        &mut self,
        link: &mut Link<'_>,
        state_at: Instant,
    ) -> Result<Word, ReceiveError> {
        let mut connected = true;
        let ready_at = Instant::now();
        let (mut heard, mut bytes) = (ready_at, link.bytes_received());
        let mut undecided = false;
        loop {
            self.desk.hush();
            if let Some(decision) = self.control.take_decision()
                && self.desk.with_ledger(|ledger| ledger.decide(decision))
            {
                tracing::warn!(?decision, "an operator decided for the machine that was ready");
                return match decision {
                    // The guest was paused before its state was sent; nothing here knows when.
                    Decision::Run => Ok(Word {
                        stopped_at: Some(state_at),
                        connected,
                    }),
                    Decision::Discard => Err(ReceiveError::Discarded),
                };
            }
            if self
                .desk
                .with_ledger(|ledger| !matches!(ledger.stage(), Stage::Ready(_)))
            {
                return Err(ReceiveError::GivenUp);
            }
            // A source that is silent for too long may be gone, and its operator the only one who knows. It may
            // still have its say: whatever comes first counts. One that speaks again is not gone.
            let silent = heard.elapsed() > self.options.io_timeout
                || ready_at.elapsed() > self.options.step_timeout
                || !connected;
            if silent && !undecided {
                undecided = true;
                self.control.set_undecided(true);
            } else if undecided && !silent {
                undecided = !self.control.end_doubt();
            }
            let others = [self.desk.bell(), self.control.decided()];
            if !connected {
                wait_for(&others)?;
                continue;
            }
            let overdue = (heard + self.options.io_timeout).min(ready_at + self.options.step_timeout);
            let said = hear(link, &others, (!silent).then_some(overdue));
            if link.bytes_received() != bytes {
                (heard, bytes) = (Instant::now(), link.bytes_received());
            }
            match said {
                Ok(Some(Go { stopped_at })) if self.desk.with_ledger(|ledger| ledger.go()) => {
                    return Ok(Word {
                        stopped_at,
                        connected,
                    });
                }
                Ok(_) => {}
                Err(error) if error.is_abort() && self.desk.with_ledger(|ledger| ledger.discard()) => {
                    return Err(error.into());
                }
                // The loss of the connection is no word.
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(
                        error,
                        "the source was lost; the machine is ready and waits for a word"
                    );
                    connected = false;
                }
            }
        }
    }
}

/// The source's word.
struct Go {
    /// The moment at which the guest stopped, unless that lies before this clock's beginning.
    stopped_at: Option<Instant>,
}

/// Waits for the source to say something, for one of `others`, or until a moment.
fn hear(
    link: &mut Link<'_>,
    others: &[BorrowedFd<'_>],
    until: Option<Instant>,
) -> Result<Option<Go>, LinkError> {
    link.await_peer(others, until)?;
    let what = "go";
    let Some(Heard::Said(frame)) = link.poll(what)? else {
        return Ok(None);
    };
    match frame {
        Frame::Message(Message::Go {
            stopped_for_ns,
            round_trip_ns,
        }) => {
            let now = Instant::now();
            // Half a round trip ago "go" was sent, and the guest had been paused for that long.
            let stopped_for = Duration::from_nanos(stopped_for_ns);
            let ago = stopped_for.saturating_add(Duration::from_nanos(round_trip_ns / 2));
            Ok(Some(Go {
                stopped_at: now.checked_sub(ago),
            }))
        }
        frame => Err(LinkError::Unexpected {
            expected: what,
            got: frame.name(),
        }),
    }
}

fn wait_for(others: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
    let mut events: Vec<PollFd<'_>> = others.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    match poll(&mut events, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(LinkError::Wait(error.into())),
    }
}
