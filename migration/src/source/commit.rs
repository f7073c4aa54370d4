//! The source's part of the commit: waits for "ready", releases the disk locks, sends "go" and waits for "resumed".
//!
//! It must not change the machine or its memory any more: the destination has both already. Up to the first byte of
//! "go" an error lets the guest run here again; from then on only the destination's answer decides.

use std::time::{Duration, Instant};

use super::handshake::unexpected;
use super::switch::Stopped;
use super::{MigrateError, SourceJob};
use crate::control::Phase;
use crate::link::Link;
use crate::protocol::{Message, nanoseconds};
use crate::report::ms;

impl SourceJob<'_> {
    /// Hands the guest over: "ready", the locks, "go", "resumed".
    pub(super) fn commit(
        &mut self,
        link: &mut Link<'_>,
        stopped: Stopped,
        round_trip: Duration,
    ) -> Result<(), MigrateError> {
        let Stopped {
            paused_at,
            sent_at,
            verifying,
        } = stopped;
        let restored = match link.receive_message("ready")? {
            Message::Ready { restore_ns } => Duration::from_nanos(restore_ns),
            other => return Err(unexpected("ready", &other)),
        };
        self.report.downtime.restore_ms = ms(restored.min(sent_at.elapsed()));
        // An abort or a cancel that has come by now ends the attempt while the disks are still locked here.
        link.check("nothing after ready")?;
        self.call("release", |source| source.release())?;
        self.control.sample(|progress| progress.phase = Phase::Commit);
        let go_sent_at = self.send_go(link, paused_at, round_trip)?;
        let resumed = match link.receive_message("resumed") {
            Ok(Message::Resumed { resume_ns }) => Duration::from_nanos(resume_ns),
            Ok(Message::ResumeFailed { reason }) => {
                let _ = link.send(&Message::Farewell);
                return Err(MigrateError::NotResumed {
                    reason: crate::text::clean(&reason),
                });
            }
            Ok(other) => return Err(unexpected("resumed", &other)),
            Err(error) => return Err(MigrateError::NoAnswer(error)),
        };
        let arrived_at = Instant::now();
        self.standing.claim.moved();
        // If this is lost, the destination only waits in vain for the source to ask.
        let _ = link.send(&Message::Farewell);

        // The way of "resumed" back to the source is not downtime. It took no longer than the exchange without the
        // resume.
        let exchange = arrived_at.duration_since(go_sent_at);
        let resumed = resumed.min(exchange);
        let way_back = (round_trip / 2).min((exchange - resumed) / 2);
        let total = arrived_at
            .duration_since(paused_at)
            .saturating_sub(way_back + verifying);
        let downtime = &mut self.report.downtime;
        downtime.resume_ms = ms(resumed);
        downtime.commit_ms = 0.0;
        downtime.commit_ms = (ms(total) - downtime.total_ms()).max(0.0);
        let downtime_ms = downtime.total_ms();
        self.report.downtime_ms = Some(downtime_ms);
        self.report.budget_kept = downtime_ms <= self.report.budget_ms;
        Ok(())
    }

    /// Sends "go". The guest still belongs to the source only if the kernel accepted no byte of it.
    fn send_go(
        &mut self,
        link: &mut Link<'_>,
        paused_at: Instant,
        round_trip: Duration,
    ) -> Result<Instant, MigrateError> {
        let now = Instant::now();
        let go = Message::Go {
            stopped_for_ns: nanoseconds(now.duration_since(paused_at)),
            round_trip_ns: nanoseconds(round_trip),
        };
        link.check("nothing before go")?;
        self.standing.claim.go();
        match link.send(&go) {
            // A cancel, or the limit of the pause, came before the first byte.
            Err(error) if !link.has_begun() => {
                self.standing.claim.go_not_sent();
                Err(error.into())
            }
            sent => {
                link.ignore_cancel();
                self.control.lift_pause_limit();
                match sent {
                    Err(error) if !link.has_sent() => Err(MigrateError::NoAnswer(error)),
                    // All of "go" was sent: an interruption meanwhile came too late.
                    _ => Ok(now),
                }
            }
        }
    }
}
