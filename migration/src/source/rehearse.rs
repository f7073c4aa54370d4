//! Measures on both sides what the pause will cost besides the copy, by doing what can be repeated of it. Afterwards
//! the guest runs as before; the destination has nothing that it would not throw away.

use std::time::{Duration, Instant};

use super::handshake::unexpected;
use super::observe::SWITCH_ROUND_TRIPS;
use super::{MigrateError, SourceJob};
use crate::converge::Costs;
use crate::link::Link;
use crate::protocol::Message;
use crate::report::ms;

/// Most rehearsals in a row.
const REHEARSALS: usize = 4;

impl SourceJob<'_> {
    /// Rehearses a few times. One slow rehearsal may be the host's fault, or that of a destination that is still busy with
    /// what it has just been sent: the least of a few is the machine's, and how they differ is the host's. Fewer are made
    /// where the budget is far above them.
    pub(super) fn rehearse_several(
        &mut self,
        link: &mut Link<'_>,
        before: Costs,
    ) -> Result<Vec<Costs>, MigrateError> {
        let mut rehearsed: Vec<Costs> = Vec::with_capacity(REHEARSALS);
        while rehearsed.len() < REHEARSALS {
            rehearsed.push(self.rehearse(link, before)?);
            let most = rehearsed.iter().map(Costs::total).max().unwrap_or_default();
            if rehearsed.len() > 1 && most * 3 <= self.options.max_downtime {
                break;
            }
        }
        Ok(rehearsed)
    }

    /// Measures, on both sides and while the guest runs, what the downtime will cost besides the copy. What
    /// cannot be measured stays as it is in `before`.
    fn rehearse(&mut self, link: &mut Link<'_>, before: Costs) -> Result<Costs, MigrateError> {
        // A flush that follows another one has only the last moment's writes left, as the drain will have.
        self.call("flush", |source| source.flush())?;
        let began = Instant::now();
        self.call("flush", |source| source.flush())?;
        let drain = began.elapsed();
        let rehearsal = self.call("rehearse", |source| source.rehearse())?;
        self.report
            .rehearsal_pause_ms
            .add(ms(rehearsal.pause + rehearsal.save));
        let sent = Instant::now();
        link.send_rehearsal(&rehearsal.state)?;
        let (restore, resume) = match link.receive_message("rehearsed")? {
            Message::Rehearsed {
                restore_ns,
                resume_ns,
            } => (Duration::from_nanos(restore_ns), Duration::from_nanos(resume_ns)),
            other => return Err(unexpected("rehearsed", &other)),
        };
        // The destination's figures cannot be longer than the exchange that brought them.
        let exchange = sent.elapsed();
        let restore = restore.min(exchange);
        let resume = resume.min(exchange - restore);
        let round_trip = exchange - restore - resume;
        // This exchange carries a state, as that of the switch will, so it predicts that one better than a ping.
        let round_trips = round_trip.mul_f64(SWITCH_ROUND_TRIPS);
        Ok(Costs {
            pause: rehearsal.pause,
            drain,
            state: rehearsal.save,
            restore,
            // The rehearsal itself warms the caches: a shorter time than the default is not believed.
            resume: resume.max(Costs::default().resume),
            round_trip: round_trips,
            ..before
        })
    }
}
