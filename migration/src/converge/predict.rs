//! The downtime if the switch came now, what another round would bring, and when it all will be over.

use super::interval::Interval;
use super::working_set::{Model, again_of_hot};

/// Everything that is known at one moment: bytes of pages, seconds, bytes per second.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outlook {
    /// Since the start.
    pub at: f64,
    /// Pages of this round to be sent with their content.
    pub unsent: f64,
    /// Pages that the guest writes all the time, what it would dirty of them if it were not slowed down, and those of them
    /// that this round has not sent yet.
    pub hot: f64,
    pub hot_rate: f64,
    pub unsent_hot: f64,
    /// All pages to be sent with their content.
    pub dirty: f64,
    /// Newly dirtied, as the guest runs now.
    pub rate: f64,
    /// Newly dirtied, if it were not slowed down.
    pub natural: f64,
    /// The most that the guest can have dirty of its own; infinite where not known.
    pub working_set: f64,
    /// The most that its vCPUs can newly dirty per second, as is assumed here, and whatever they do.
    pub fastest: f64,
    pub fastest_possible: f64,
    /// What is left of this round on average, the rounds after it, and what this one can count on.
    pub link: f64,
    pub link_after: f64,
    pub link_usual: f64,
    /// The final copy: what it can count on, and what it may have to put up with.
    pub final_usual: f64,
    pub final_worst: f64,
    /// And what it may reach.
    pub final_best: f64,
    /// The downtime besides the copy, as measured, and with its uncertainty.
    pub costs: f64,
    pub costs_worst: f64,
    /// The most that it is on a quiet host, whatever slow rehearsals and stalls were seen, and the least.
    pub costs_quiet: f64,
    pub costs_best: f64,
    /// The part of it during which the guest may still write.
    pub pause: f64,
    /// What a round takes besides its bytes.
    pub overhead: f64,
    /// The longest downtime.
    pub budget: f64,
}

/// How the policy deals with a guest that is too fast: shares of the bandwidth.
#[derive(Clone, Copy, Debug)]
pub(super) struct ThrottlePlan {
    /// Above this share the guest is slowed down.
    pub limit: f64,
    /// To this share.
    pub target: f64,
    /// Whether it may be.
    pub throttle: bool,
    /// Seconds until the throttle has found its level.
    pub settling: f64,
}

/// What one more round, or the rest of this one, leads to.
#[derive(Clone, Copy, Debug)]
pub(super) struct NextRound {
    /// Bytes dirty then.
    pub dirty: f64,
    /// Seconds until then.
    pub after: f64,
}

impl Outlook {
    /// A round has to shorten the downtime by so much at least.
    const MIN_GAIN: f64 = 0.2e-3;
    /// And by this share of it, below which it is noise.
    const MIN_SHARE: f64 = 0.04;
    /// And by this share of the time that the round takes.
    const MIN_RETURN: f64 = 0.02;
    /// No migration has more rounds than this while it is thought ahead.
    const HORIZON: usize = 100;

    /// The downtime if the switch came with so many bytes dirty.
    pub(super) fn downtime(&self, dirty: f64) -> f64 {
        let grown = dirty + self.rate * self.pause;
        self.costs + grown / self.final_usual
    }

    /// The same at the pessimistic end of every term.
    pub(super) fn worst_downtime(&self, dirty: f64) -> f64 {
        let grown = dirty + self.rate.max(self.natural) * self.pause;
        self.costs_worst + grown / self.final_worst
    }

    /// What holds the downtime nine times in ten, if the switch came now.
    pub(super) fn downtime_interval(&self) -> Interval {
        Interval::of(
            self.costs_best + self.dirty / self.final_best,
            self.worst_downtime(self.dirty),
        )
    }

    /// The most bytes that may be dirty at the switch; negative where the costs alone are too much.
    pub(super) fn room(&self) -> f64 {
        (self.budget - self.least_downtime()) * self.final_worst
    }

    /// The same as on a quiet host. A host that is not quiet puts the switch off; it must not make the guest seem too fast.
    pub(super) fn room_if_quiet(&self) -> f64 {
        self.room() + (self.costs_worst - self.costs_quiet) * self.final_worst
    }

    /// Whether nothing but slow rehearsals and stalls of the host leaves no room for a page.
    pub(super) fn is_put_off(&self) -> bool {
        self.room() <= 0.0 && self.room_if_quiet() > 0.0
    }

    /// The downtime that is left if no page is dirty at the switch: the costs, and what is written while vCPUs leave.
    pub(super) fn least_downtime(&self) -> f64 {
        self.costs_worst + self.rate.max(self.natural) * self.pause / self.final_worst
    }

    /// Whether a switch now is sure to keep the budget.
    pub(super) fn fits(&self) -> bool {
        self.worst_downtime(self.dirty) <= self.budget
    }

    /// The end of this round, or of the next one if this has ended.
    pub(super) fn next(&self) -> NextRound {
        if self.unsent > 0.0 {
            let after = self.unsent / self.link;
            return self.grown(self.dirty - self.unsent, after);
        }
        self.grown(0.0, self.dirty / self.link + self.overhead)
    }

    /// The round after that.
    pub(super) fn then(&self, next: NextRound) -> NextRound {
        let then = self.grown(0.0, next.dirty / self.link + self.overhead);
        NextRound {
            after: next.after + then.after,
            ..then
        }
    }

    fn grown(&self, dirty: f64, after: f64) -> NextRound {
        NextRound {
            dirty: (dirty + self.rate * after).min(self.working_set.max(dirty)),
            after,
        }
    }

    /// Whether it is worth going on with this round, or with another after what little is left of it.
    pub(super) fn pays_to_go_on(&self) -> bool {
        let next = self.next();
        self.pays(self.dirty, next) || self.pays(self.dirty, self.then(next))
    }

    /// Whether it is worth going on until `next` with so many bytes dirty.
    fn pays(&self, dirty: f64, next: NextRound) -> bool {
        let gain = (dirty - next.dirty) / self.final_usual;
        let threshold = (Self::MIN_SHARE * self.downtime(dirty)).max(Self::MIN_RETURN * next.after);
        gain > threshold.max(Self::MIN_GAIN)
    }

    /// The same if it takes the guest so many times as long as the least to write to a hot page for the first time; what
    /// such writes take is known once hot pages were sent.
    pub(super) fn with_faults_of(&self, times: f64) -> Self {
        let times = if self.unsent_hot > 0.0 { times } else { 1.0 };
        Self {
            fastest: self.fastest_possible / times,
            ..*self
        }
    }

    /// What a guest dirties that writes to all of its working set as often as `model` says, and to hot pages all the time.
    pub(super) fn natural_of(&self, model: Model) -> f64 {
        let others = model.frequency * (self.working_set - self.hot).max(0.0);
        (others + self.hot_rate).min(self.fastest)
    }

    /// The total time, counted from the start. `model` is what round 1 has shown so far, and given in round 1
    /// only. `None` where it does not converge.
    pub(super) fn total(&self, plan: ThrottlePlan, model: Option<Model>) -> Option<f64> {
        let (mut at, mut dirty, natural) = match model {
            Some(model) => {
                let after = self.unsent / self.link;
                let hot = again_of_hot(self.unsent_hot, self.unsent_hot / self.link);
                let again = model.again(self.unsent - self.unsent_hot, after)
                    + hot.min(self.fastest * self.unsent_hot / self.link);
                let dirty = (self.dirty - self.unsent).max(0.0) + again;
                (self.at + after, dirty, self.natural_of(model))
            }
            None => (self.at, self.dirty, self.natural),
        };
        let then = Self {
            unsent: 0.0,
            rate: natural,
            link: self.link_after,
            ..*self
        };
        if plan.throttle && natural > plan.limit * then.link && self.room() > 0.0 {
            let room = self.room().min(dirty);
            at += plan.settling + (dirty - room) / (then.link * (1.0 - plan.target)).max(1.0);
            return Some(at + then.downtime(room));
        }
        let mut next = if model.is_some() {
            NextRound { dirty, after: 0.0 }
        } else {
            self.next()
        };
        for _ in 0..Self::HORIZON {
            let fits = then.worst_downtime(dirty) <= self.budget;
            if fits && !then.pays(dirty, next) {
                return Some(at + then.downtime(dirty));
            }
            if !fits && next.dirty > dirty * 0.999 && next.after > 0.0 {
                return None;
            }
            (at, dirty) = (at + next.after, next.dirty);
            next = then.grown(0.0, dirty / then.link + self.overhead);
        }
        None
    }
}
