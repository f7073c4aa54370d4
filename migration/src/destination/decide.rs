//! A machine that is ready waits for the word that decides who runs it: the source's "go" or abort, an operator's
//! decision, or a source that asks on another connection.

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
    /// Whether the source is still connected and can be told.
    pub(super) connected: bool,
}

/// The wait of a machine that is ready: for as long as it takes, with the source or without it.
pub(super) struct Waiting<'a, 'b, 'l> {
    local: &'a LocalSide<'b>,
    link: &'a mut Link<'l>,
    /// When the state had come: the guest stopped before that.
    state_at: Instant,
    ready_at: Instant,
    connected: bool,
    /// When the last byte came from the source, and how many had come by then.
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

    /// Waits for "go" or for an operator's "run": then the guest may run here. Whatever else the ledger counts gives the
    /// machine up, and is an error.
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

    /// What an operator has decided, if the ledger takes it: the source's word may have come first.
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

    /// Whether the machine was not given up meanwhile, on another connection.
    fn is_still_ready(&self) -> bool {
        self.local
            .rendezvous
            .with_ledger(|ledger| matches!(ledger.stage(), Stage::Ready(_)))
    }

    /// Lets the operator decide while the source is silent for too long: it may be gone, and only the operator knows. The
    /// source's word still counts if it comes first, and a source that speaks again decides itself. Returns whether the
    /// source is silent.
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

    /// Waits for the source, an operator or another connection, and returns what the source's word decides, if one came.
    fn await_source(&mut self, silent: bool) -> Option<Result<MayRun, ReceiveError>> {
        let wakers = [self.local.rendezvous.event(), self.local.control.decided()];
        if !self.connected {
            return wait_for(&wakers).err().map(|error| Err(error.into()));
        }
        let (last_byte_at, bytes) = self.last_byte;
        let overdue = (last_byte_at + self.local.options.io_timeout)
            .min(self.ready_at + self.local.options.step_timeout);
        let word = receive_go(self.link, &wakers, (!silent).then_some(overdue));
        if self.link.bytes_received() != bytes {
            self.last_byte = (Instant::now(), self.link.bytes_received());
        }
        match word {
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
                    "the source was lost; the machine is ready and waits for a word"
                );
                self.connected = false;
                None
            }
        }
    }
}

/// The source's word that the guest runs here.
struct Go {
    /// The moment at which the guest stopped, unless that lies before this clock's beginning.
    stopped_at: Option<Instant>,
}

/// Waits for a frame of the source, for one of `wakers`, or until a moment. Returns "go" if it came.
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

/// Waits for one of `wakers`, for as long as it takes.
fn wait_for(wakers: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
    let mut events: Vec<PollFd<'_>> = wakers.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    match poll(&mut events, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(LinkError::Wait(error.into())),
    }
}
