//! Follows the control connection while the streams fill memory, until all memory and the state have arrived.
//!
//! Acknowledges a round only when all its pages are in memory, and accepts each kind of message only in its turn. A
//! source that is silent or makes no progress is given up after the time-outs of [`crate::ReceiveOptions`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ReceiveError;
use super::error::call;
use super::local::LocalSide;
use super::memory::Incoming;
use super::populate::Populate;
use super::streams::Streams;
use crate::link::{Link, LinkError, Sorted};
use crate::protocol::{Frame, Message, nanoseconds};

/// The most rehearsals in a migration. A source rehearses a few times in a round.
const MAX_REHEARSALS: u32 = 4096;

/// The most digests in a migration, as each reads all memory. A source asks for one at each attempt to switch.
const MAX_DIGESTS: u32 = 16;

/// How often the streams' counters are read: bytes on a stream do not wake this thread.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// What the source may send in this phase, for errors.
const WHAT: &str = "populated, round end, a rehearsal or the state";

/// The phase between "accept" and the state.
pub(super) struct Filling<'a, 'b, 'l> {
    local: &'a mut LocalSide<'b>,
    link: &'a mut Link<'l>,
    incoming: &'a Incoming,
    streams: &'a Arc<Streams>,
    populate: &'a Populate,
    activity: SourceActivity,
    /// The last round whose end came on the control connection.
    round: u32,
    /// Whether that round has been acknowledged.
    acknowledged: bool,
    /// The machine's state, once it has come.
    state: Option<Vec<u8>>,
    /// How many rehearsals the source has asked for.
    rehearsals: u32,
    /// How many digests the source has asked for.
    digests: u32,
}

/// When the source last did something, and until when it must.
struct SourceActivity {
    /// When the last byte came, on any connection.
    last_byte_at: Instant,
    /// When the migration last advanced: by a message other than a keep-alive, or by bytes on a stream.
    last_progress_at: Instant,
    /// Bytes that had come by then, on the control connection and on the streams.
    bytes: (u64, u64),
    /// Until when all streams must have joined.
    joined_by: Instant,
}

impl<'a, 'b, 'l> Filling<'a, 'b, 'l> {
    pub(super) fn new(
        local: &'a mut LocalSide<'b>,
        link: &'a mut Link<'l>,
        incoming: &'a Incoming,
        streams: &'a Arc<Streams>,
        populate: &'a Populate,
    ) -> Self {
        let now = Instant::now();
        let activity = SourceActivity {
            last_byte_at: now,
            last_progress_at: now,
            bytes: (0, 0),
            joined_by: now + local.options.io_timeout,
        };
        Self {
            local,
            link,
            incoming,
            streams,
            populate,
            activity,
            round: 0,
            acknowledged: true,
            state: None,
            rehearsals: 0,
            digests: 0,
        }
    }

    /// Runs until all memory and the state have arrived; starts streams as they join. Returns the state.
    pub(super) fn run(&mut self) -> Result<Vec<u8>, ReceiveError> {
        loop {
            self.local.rendezvous.clear_event();
            self.streams.start_joined()?;
            self.publish_progress();
            let check_again_at = self.streams.check_failure()?;
            if !self.is_still_filling() {
                return Err(ReceiveError::GivenUp);
            }
            self.acknowledge()?;
            if self.acknowledged
                && let Some(state) = self.state.take()
            {
                return Ok(state);
            }
            let until = self.next_deadline()?.min(check_again_at.unwrap_or_else(far_off));
            self.link
                .await_peer(&[self.local.rendezvous.event()], Some(until))?;
            if let Some(Sorted::Frame(frame)) = self.link.poll(WHAT)? {
                self.activity.last_progress_at = Instant::now();
                self.process_frame(frame)?;
            }
        }
    }

    /// Publishes how far the migration is. `bytes_sent` is the source's field; here it counts what has come.
    fn publish_progress(&self) {
        let bytes = self.incoming.received();
        self.local
            .control
            .update(|progress| progress.bytes_sent = progress.bytes_sent.max(bytes));
    }

    /// Whether the machine was not given up meanwhile, by a question of the source on another connection.
    fn is_still_filling(&self) -> bool {
        self.local
            .rendezvous
            .with_ledger(|ledger| *ledger.stage() != crate::commit::Stage::Idle)
    }

    /// Acknowledges the round to the source, once all its pages are in memory.
    fn acknowledge(&mut self) -> Result<(), ReceiveError> {
        if self.acknowledged || !self.streams.is_complete(self.round) {
            return Ok(());
        }
        self.link.send(&Message::RoundAck(self.round))?;
        self.acknowledged = true;
        self.populate.round_ended();
        Ok(())
    }

    /// Until when to wait for the source at most. An error if the source has exceeded a time-out.
    fn next_deadline(&mut self) -> Result<Instant, ReceiveError> {
        let (now, options) = (Instant::now(), self.local.options);
        let bytes = (self.link.bytes_received(), self.incoming.activity());
        if bytes != self.activity.bytes {
            self.activity.last_byte_at = now;
        }
        if bytes.1 != self.activity.bytes.1 {
            self.activity.last_progress_at = now;
        }
        self.activity.bytes = bytes;
        let silent_by = self.activity.last_byte_at + options.io_timeout;
        let mut stuck_by = self.activity.last_progress_at + options.step_timeout;
        if let Some(due) = self.link.frame_due() {
            // A frame whose first part has come has a time limit of its own, as long as a step's.
            stuck_by = stuck_by.max(due);
        }
        let timed_out = |what, after| Err(LinkError::TimedOut { what, after }.into());
        if now >= silent_by {
            return timed_out(WHAT, options.io_timeout);
        }
        if now >= stuck_by {
            return timed_out("anything but keep-alives", options.step_timeout);
        }
        let mut next = silent_by.min(stuck_by).min(now + POLL_INTERVAL);
        if self.streams.missing() > 0 {
            if now >= self.activity.joined_by {
                return timed_out("all streams to join", options.io_timeout);
            }
            next = next.min(self.activity.joined_by);
        }
        Ok(next)
    }

    /// Acts on a frame, if it is this kind's turn.
    fn process_frame(&mut self, frame: Frame) -> Result<(), ReceiveError> {
        let got = frame.name();
        let in_turn = self.acknowledged && self.state.is_none();
        let with_streams = !self.streams.is_handover();
        match frame {
            Frame::Message(Message::Populated(spans)) if in_turn && with_streams => self.populate.add(&spans),
            Frame::Message(Message::RoundEnd(round)) if in_turn && with_streams => self.end_round(round),
            Frame::Message(Message::DigestRequest) if in_turn && self.digests < MAX_DIGESTS => {
                self.digests += 1;
                let digest = self.incoming.digest(self.streams.count(), self.local.control)?;
                self.answer(&Message::Digest(digest))
            }
            Frame::Rehearsal(state) if in_turn && self.rehearsals < MAX_REHEARSALS => {
                self.rehearsals += 1;
                self.rehearse(&state)
            }
            // Pages of the last round may still be on their way: the state is kept until the round is complete.
            Frame::State(state) if self.state.is_none() => {
                self.state = Some(state);
                Ok(())
            }
            _ => Err(LinkError::Unexpected { expected: WHAT, got }.into()),
        }
    }

    fn end_round(&mut self, round: u32) -> Result<(), ReceiveError> {
        let expected = self.round.saturating_add(1);
        if round != expected {
            return Err(ReceiveError::Round { expected, got: round });
        }
        self.round = round;
        self.acknowledged = false;
        self.local.control.update(|progress| progress.round = round);
        Ok(())
    }

    fn rehearse(&mut self, state: &[u8]) -> Result<(), ReceiveError> {
        let began = Instant::now();
        let resume = call("rehearse", self.local.destination.rehearse(state))?;
        self.answer(&Message::Rehearsed {
            restore_ns: nanoseconds(began.elapsed().saturating_sub(resume)),
            resume_ns: nanoseconds(resume),
        })
    }

    /// Sends the answer to a step of this side. The source had to wait for it, so its time-outs begin anew.
    fn answer(&mut self, message: &Message) -> Result<(), ReceiveError> {
        self.link.send(message)?;
        let now = Instant::now();
        (self.activity.last_byte_at, self.activity.last_progress_at) = (now, now);
        Ok(())
    }
}

/// Later than any deadline here.
fn far_off() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}
