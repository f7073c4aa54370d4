//! After a migration that failed just before "go", the guest runs here, and the destination may be ready and not know
//! that. It is asked until it answers, which makes it give the machine up.
//!
//! An operator may have had the guest run at the destination before that. Then it ran in both places, and this copy is
//! paused until an operator decides which of the two stays. It must not run on, and must not be thrown away.

use std::thread;
use std::time::{Duration, Instant};

use migration::{Answer, Doubt, Remains, Source};
use threads::Role;

use super::resolve::ASK_TIMEOUT;
use super::{DoubtSide, Event, Life, Supervisor, SupervisorHandle};
use crate::machine::MigrationSource;
use crate::vcpu::park_deadline;

/// The pause between the first two questions; each further one is twice as long, up to a limit.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause between two questions.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// For how long the destination is asked: if it waits for longer, its operator has to decide.
const ASK_FOR: Duration = Duration::from_secs(3600);
/// The most destinations that are asked at a time.
const MAX_ASKED: usize = 4;

/// The questions under way.
#[derive(Debug, Default)]
pub(super) struct Withdrawals {
    /// How many destinations are being asked.
    pub(super) asked: usize,
    /// The question to a destination that runs the guest as well.
    second: Option<Doubt>,
}

impl Withdrawals {
    /// Counts a question that has ended, by an event or because its thread failed: another destination may be asked.
    pub(super) fn count_end(&mut self) {
        self.asked = self.asked.saturating_sub(1);
    }
}

impl Supervisor {
    /// Starts to ask a destination until it answers; one that waits for "go" gives the machine up by that.
    pub(super) fn withdraw(&mut self, doubt: Doubt) {
        if self.withdrawals.asked == MAX_ASKED {
            tracing::warn!(to = %doubt.endpoint(), "too many destinations are being asked already: this one is not, and may wait for \"go\"");
            return;
        }
        let supervisor = self.handle.clone();
        let ask = move || ask_until_answered(doubt, &supervisor);
        match threads::spawn(Role::Withdraw, "withdraw", ask) {
            Ok(_) => self.withdrawals.asked += 1,
            Err(error) => tracing::warn!(%error, "the destination cannot be asked, and may wait for \"go\""),
        }
    }

    /// Handles a destination's answer, or that there was none for too long.
    pub(super) fn withdrawn(&mut self, doubt: Doubt, answer: Option<Answer>) {
        self.withdrawals.count_end();
        let to = doubt.endpoint();
        match answer {
            Some(Answer::GaveUp) => {
                tracing::info!(%to, "the destination knows that the guest runs on here");
            }
            Some(Answer::Unknown) | None => {
                tracing::warn!(%to, "the destination never learnt that the guest runs on here")
            }
            Some(Answer::Runs | Answer::Kept { .. }) => {
                tracing::error!(
                    %to,
                    "an operator has the guest run at the destination, while it runs here: this copy is paused"
                );
                self.withdrawals.second = Some(doubt);
                if let Some(migration) = &self.migration {
                    migration.job.control.cancel();
                }
                self.stop_second_copy();
            }
        }
    }

    /// Pauses a guest that runs elsewhere as well, once no migration has it.
    pub(super) fn stop_second_copy(&mut self) {
        // The job or operation that has the machine calls this again when it has ended.
        if self.migration.is_some() || self.operation.is_some() || !matches!(self.life, Some(Life::Here(_))) {
            return;
        }
        let Some(doubt) = self.withdrawals.second.take() else {
            return;
        };
        if let Some(Life::Here(machine)) = self.life.take() {
            let mut source = Box::new(MigrationSource::new(machine.clone()));
            if let Err(error) = source.pause(park_deadline()) {
                let error = migration::chain(&*error);
                tracing::error!(error, "the guest runs on here although it runs elsewhere");
            }
            let side = DoubtSide::Source {
                source: Some(source),
                doubt: Some(doubt),
                remains: Remains::default(),
            };
            self.life = Some(Life::InDoubt(machine, side));
        }
    }
}

/// Asks until the destination answers, or [`ASK_FOR`] is over; the result is an event to the supervisor.
fn ask_until_answered(doubt: Doubt, supervisor: &SupervisorHandle) {
    let began = Instant::now();
    let mut pause = FIRST_PAUSE;
    let answer = loop {
        match doubt.ask(ASK_TIMEOUT) {
            // A receiver that knows nothing of the migration may be another one than the one that waits.
            Ok(answer) if answer != Answer::Unknown => break Some(answer),
            Ok(_) | Err(_) if began.elapsed() >= ASK_FOR => break None,
            Ok(_) | Err(_) => thread::sleep(pause),
        }
        pause = (pause * 2).min(MAX_PAUSE);
    };
    supervisor.send(Event::Withdrawn(doubt, answer));
}
