//! Chooses whether compression pays, by what it saves and what it costs.

/// The most batches that go without an attempt after many failures.
const MAX_SKIPPED: u32 = 64;

/// Decides which batches to try to compress: each failure doubles the number of batches that go without an
/// attempt, up to 64, and one success makes every batch worth it again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chooser {
    /// Batches to skip before the next attempt.
    left: u32,
    /// How many batches are skipped after the next failure, less one.
    penalty: u32,
}

impl Chooser {
    /// Whether to try to compress the next batch. Must be called once for each batch.
    pub fn attempt(&mut self) -> bool {
        let now = self.left == 0;
        self.left = self.left.saturating_sub(1);
        now
    }

    /// Takes note of an attempt: `paid` says whether the block was small enough.
    pub fn learn(&mut self, paid: bool) {
        if paid {
            *self = Self::default();
        } else {
            self.left = (self.penalty + 1).min(MAX_SKIPPED);
            self.penalty = (self.penalty * 2 + 1).min(MAX_SKIPPED - 1);
        }
    }
}
