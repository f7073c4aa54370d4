//! Whether a promise cannot be kept, and what could be kept instead.

use super::Policy;
use crate::converge::interval::most_cost;
use crate::converge::predict::{Outlook, ThrottlePlan};
use crate::converge::{Miss, Observation, Reason, duration};

/// The last moment at which the dirty set had become noticeably smaller.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shrinkage {
    mark: Option<(f64, f64)>,
}

impl Policy {
    /// Whether it will not become better: only asked while the budget is not kept.
    pub(super) fn hopeless(&mut self, seen: &Observation<'_>, now: &Outlook) -> Option<Reason> {
        let first = seen.round <= 1 && !seen.end_of_round;
        if !first && !self.rehearsed.is_empty() && self.is_too_dear(now) {
            return Some(Reason::Costs);
        }
        if self.looks_late(now, first) {
            return Some(Reason::Deadline);
        }
        if !first && now.is_put_off() {
            self.progress.mark = None;
            let since = *self.put_off_since.get_or_insert(now.at);
            return (now.at - since >= Self::PUT_OFF).then_some(Reason::Costs);
        }
        self.put_off_since = None;
        if seen.end_of_round && seen.round >= self.goal.max_rounds {
            return Some(Reason::Rounds);
        }
        let slowest = !self.goal.throttle || self.goal.cpus == 0 || self.throttler.is_exhausted();
        if first || !slowest {
            self.progress.mark = None;
            return None;
        }
        self.progress.is_stuck(now).then_some(Reason::DirtyRate)
    }

    /// Whether the budget is less than what the pause costs without a page to copy. Rehearsals that differ put the switch
    /// off, and are no reason to give up: the next ones may be better.
    fn is_too_dear(&self, now: &Outlook) -> bool {
        let written = now.rate.max(now.natural) * now.pause / now.final_worst;
        most_cost(now.costs) + written >= now.budget
    }

    /// Whether the deadline cannot be met even if the guest is slowed down as far as it may be.
    fn looks_late(&mut self, now: &Outlook, first: bool) -> bool {
        let Some(left) = self.left(now) else { return false };
        if left <= 0.0 {
            return true;
        }
        let room = now.room_if_quiet().max(0.0);
        let dirtied = if self.goal.throttle || first {
            0.0
        } else {
            now.rate
        };
        let to_send = (now.dirty - room).max(0.0) / (now.link - dirtied).max(1.0);
        if !self.link.is_known() || to_send <= left {
            self.late_since = None;
            return false;
        }
        now.at - *self.late_since.get_or_insert(now.at) >= Self::PATIENCE
    }

    /// What the guest would dirty if all of its working set were clean, as far as round 1 has told: where
    /// everything is dirtied again as soon as it is sent, the rate that can be seen is no more than the bandwidth.
    fn hidden_rate(&self, now: &Outlook) -> f64 {
        let saturated = self.throttler.is_off() && now.rate > 0.9 * now.link;
        let model = self
            .working_set
            .model()
            .filter(|model| saturated && model.is_resolved());
        model.map_or(0.0, |model| now.natural_of(model))
    }

    pub(super) fn miss(&self, reason: Reason, now: &Outlook) -> Miss {
        let left = self.left(now).unwrap_or(0.0).max(0.0);
        let room = now.room().max(0.0);
        let dirty_rate = now.natural.max(now.rate).max(self.hidden_rate(now));
        let converging = dirty_rate / Self::LIMIT;
        let needed = match reason {
            Reason::Costs => None,
            Reason::DirtyRate | Reason::Rounds => Some(converging),
            Reason::Deadline => Some((now.dirty - room).max(0.0) / left.max(1e-3) + now.rate),
        };
        let at_deadline = (now.dirty - (now.link - now.rate).max(0.0) * left).max(0.0);
        let attainable = match reason {
            Reason::Costs => now.least_downtime(),
            Reason::DirtyRate | Reason::Rounds => now.worst_downtime(now.dirty),
            Reason::Deadline => now.worst_downtime(at_deadline),
        };
        let plan = ThrottlePlan {
            limit: Self::LIMIT,
            target: Self::TARGET,
            throttle: self.goal.throttle,
            settling: self.settling(),
        };
        let total = (reason == Reason::Deadline)
            .then(|| now.total(plan, None))
            .flatten();
        Miss {
            reason,
            max_downtime: self.goal.max_downtime,
            deadline: self.goal.deadline,
            at: duration(now.at),
            needed_bandwidth: needed,
            bandwidth: now.link_usual,
            dirty_rate,
            attainable_downtime: duration(attainable),
            attainable_total: total.map(duration),
            throttle: self.goal.throttle,
        }
    }
}

impl Shrinkage {
    /// Whether the dirty set has stopped to shrink: for long enough that a guest which leaves a few percent of
    /// the bandwidth would have shown it.
    fn is_stuck(&mut self, now: &Outlook) -> bool {
        let (since, dirty) = *self.mark.get_or_insert((now.at, now.dirty));
        if now.dirty < dirty * 0.97 {
            self.mark = Some((now.at, now.dirty));
            return false;
        }
        now.at - since > 0.25 + 0.6 * dirty / now.link
    }
}
