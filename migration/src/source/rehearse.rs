//! Measures on both sides, while the guest runs, what its pause will cost besides the copy.

use std::time::{Duration, Instant};

use super::handshake::unexpected;
use super::observe::SWITCH_ROUND_TRIPS;
use super::{MigrateError, SourceJob};
use crate::converge::Costs;
use crate::link::Link;
use crate::protocol::Message;
use crate::report::ms;

impl SourceJob<'_> {
    /// Measures, on both sides and while the guest runs, what the downtime will cost besides the copy. What
    /// cannot be measured stays as it is in `before`.
    pub(super) fn rehearse(&mut self, link: &mut Link<'_>, before: Costs) -> Result<Costs, MigrateError> {
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
        // A peer's word is worth no more than the time that it took to give it.
        let exchange = sent.elapsed();
        let restore = restore.min(exchange);
        let resume = resume.min(exchange - restore);
        let round_trip = exchange - restore - resume;
        // An exchange that carries the state tells more about the one of the switch than a ping does.
        let round_trips = round_trip.mul_f64(SWITCH_ROUND_TRIPS);
        Ok(Costs {
            pause: rehearsal.pause,
            drain,
            state: rehearsal.save,
            restore,
            // Less than what is always assumed was measured with the machine warmed up by the try itself.
            resume: resume.max(Costs::default().resume),
            round_trip: round_trips,
            ..before
        })
    }
}
