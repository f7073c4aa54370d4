//! Waits, with a machine that is ready, for what decides which side runs it: the source's "go" or abort, an operator's
//! decision, or a question of the source on another connection.
//!
//! Whichever the ledger records first counts. The loss of the connection decides nothing, and no time-out ends the
//! wait.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::ReceiveError;
use super::local::LocalSide;
use crate::commit::Stage;
use crate::control::Decision;
use crate::link::{Link, LinkError, Sorted};
use crate::protocol::{Frame, Message};
use crate::text::chain;

/// The guest may run here.
pub(super) struct MayRun {
    /// When the guest stopped, on this side's clock, as far as is known.
    pub(super) stopped_at: Option<Instant>,
    /// Whether the source is still connected, so that "resumed" can be sent.
    pub(super) connected: bool,
}

/// The wait of a machine that is ready, which goes on without a limit even if the source is lost.
pub(super) struct Waiting<'a, 'b, 'l> {
    local: &'a LocalSide<'b>,
    link: &'a mut Link<'l>,
    /// When the state had arrived: the guest was paused before that.
    state_at: Instant,
    /// When "ready" was sent.
    ready_at: Instant,
    /// Whether the source is still connected.
    connected: bool,
    /// When the source's last byte came, and how many bytes had come by then.
    last_byte: (Instant, u64),
    /// Whether an operator may decide, because the source has been silent for too long.
    undecided: bool,
}

impl<'a, 'b, 'l> Waiting<'a, 'b, 'l> {
    pub(super) fn new(local: &'a LocalSide<'b>, link: &'a mut Link<'l>, state_at: Instant) -> Self {
        let ready_at = Instant::now();
        let last_byte = (ready_at, link.bytes_received());
        Self {
            local,
            link,
            state_at,
            ready_at,
            connected: true,
            last_byte,
            undecided: false,
        }
    }

    /// Waits for "go" or for an operator's "run", after which the guest may run here. Everything else that the ledger
    /// records gives the machine up, and is an error.
    pub(super) fn run(mut self) -> Result<MayRun, ReceiveError> {
        let decided = loop {
            self.local.rendezvous.clear_event();
            if let Some(decided) = self.take_operators_decision() {
                break decided;
            }
            if !self.is_still_ready() {
                break Err(ReceiveError::GivenUp);
            }
            let silent = self.note_silence();
            if let Some(decided) = self.await_source(silent) {
                break decided;
            }
        };
        self.local.control.set_undecided(false);
        decided
    }

    /// The operator's decision, if there is one and the ledger records it: "go" or an abort may have come first.
    fn take_operators_decision(&mut self) -> Option<Result<MayRun, ReceiveError>> {
        let decision = self.local.control.take_decision()?;
        if !self
            .local
            .rendezvous
            .with_ledger(|ledger| ledger.decide(decision))
        {
            return None;
        }
        tracing::warn!(?decision, "an operator decided for the machine that was ready");
        Some(match decision {
            // The guest was paused before its state was sent; this side does not know when.
            Decision::Run => Ok(MayRun {
                stopped_at: Some(self.state_at),
                connected: self.connected,
            }),
            Decision::Discard => Err(ReceiveError::Discarded),
        })
    }

    /// Whether the machine is still ready: a question on another connection gives it up.
    fn is_still_ready(&self) -> bool {
        self.local
            .rendezvous
            .with_ledger(|ledger| matches!(ledger.stage(), Stage::Ready(_)))
    }

    /// Allows the operator to decide once the source has been silent for too long: it may be gone, which only the
    /// operator can find out. "go" or an abort still counts if it comes first, and once the source sends again, only
    /// the source decides. Returns whether the source is silent.
    fn note_silence(&mut self) -> bool {
        let (last_byte_at, _) = self.last_byte;
        let silent = last_byte_at.elapsed() > self.local.options.io_timeout
            || self.ready_at.elapsed() > self.local.options.step_timeout
            || !self.connected;
        if silent && !self.undecided {
            self.undecided = true;
            self.local.control.set_undecided(true);
        } else if self.undecided && !silent {
            self.undecided = !self.local.control.end_doubt();
        }
        silent
    }

    /// Waits for the source, the operator or another connection. Returns what "go" or an abort of the source decides,
    /// if one came.
    fn await_source(&mut self, silent: bool) -> Option<Result<MayRun, ReceiveError>> {
        let wakers = [self.local.rendezvous.event(), self.local.control.decided()];
        if !self.connected {
            return wait_for(&wakers).err().map(|error| Err(error.into()));
        }
        let (last_byte_at, bytes) = self.last_byte;
        let overdue = (last_byte_at + self.local.options.io_timeout)
            .min(self.ready_at + self.local.options.step_timeout);
        let received = receive_go(self.link, &wakers, (!silent).then_some(overdue));
        if self.link.bytes_received() != bytes {
            self.last_byte = (Instant::now(), self.link.bytes_received());
        }
        match received {
            Ok(Some(Go { stopped_at })) if self.local.rendezvous.with_ledger(|ledger| ledger.go()) => {
                Some(Ok(MayRun {
                    stopped_at,
                    connected: self.connected,
                }))
            }
            Ok(_) => None,
            Err(error)
                if error.is_abort() && self.local.rendezvous.with_ledger(|ledger| ledger.discard()) =>
            {
                Some(Err(error.into()))
            }
            // The loss of the connection decides nothing.
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(
                    error,
                    "the connection to the source was lost; the machine is ready and waits for a decision"
                );
                self.connected = false;
                None
            }
        }
    }
}

/// The source's "go": the guest is to run here.
struct Go {
    /// When the guest was paused, unless this host's clock cannot express a moment that early.
    stopped_at: Option<Instant>,
}

/// Waits for a frame from the source, for one of `wakers`, or until `until`. Returns "go" if it came.
fn receive_go(
    link: &mut Link<'_>,
    wakers: &[BorrowedFd<'_>],
    until: Option<Instant>,
) -> Result<Option<Go>, LinkError> {
    link.await_peer(wakers, until)?;
    let what = "go";
    let Some(Sorted::Frame(frame)) = link.poll(what)? else {
        return Ok(None);
    };
    match frame {
        Frame::Message(Message::Go {
            stopped_for_ns,
            round_trip_ns,
        }) => {
            let now = Instant::now();
            // "go" was sent half a round trip ago, and then the guest had been paused for `stopped_for`.
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

/// Waits for one of `wakers`, for as long as it takes.
fn wait_for(wakers: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
    let mut events: Vec<PollFd<'_>> = wakers.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    match poll(&mut events, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(LinkError::Wait(error.into())),
    }
}
