//! Which block comes next, of those that are read or copied while the guest runs: one that the guest waits for, or else the next one after the last of those. No I/O.

use std::collections::{BTreeSet, VecDeque};

/// The blocks that nobody has taken yet.
#[derive(Debug)]
pub(super) struct BlockQueue {
    left: BTreeSet<usize>,
    /// Those of them that the guest waits for, in the order in which it came to wait.
    demanded: VecDeque<usize>,
    /// Where to go on when the guest waits for none: a guest that walks through its memory finds the next blocks there.
    next: usize,
}

impl BlockQueue {
    /// All of so many blocks are left.
    pub(super) fn new(count: usize) -> Self {
        Self {
            left: (0..count).collect(),
            demanded: VecDeque::new(),
            next: 0,
        }
    }

    /// The guest waits for a block. Returns whether it is still to be taken.
    pub(super) fn demand(&mut self, block: usize) -> bool {
        let left = self.left.contains(&block);
        if left && !self.demanded.contains(&block) {
            self.demanded.push_back(block);
        }
        left
    }

    /// Whether the guest waits for a block that is left.
    pub(super) fn is_demanded(&self) -> bool {
        !self.demanded.is_empty()
    }

    /// Whether no block is left.
    pub(super) fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// Takes the next block; nothing when all were taken.
    pub(super) fn take(&mut self) -> Option<usize> {
        let next = self.demanded.pop_front();
        let next = next.or_else(|| self.left.range(self.next..).next().copied());
        let block = next.or_else(|| self.left.first().copied())?;
        self.left.remove(&block);
        self.next = block + 1;
        Some(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_waits_for_comes_first_and_its_neighbours_next() {
        let mut queue = BlockQueue::new(6);
        assert_eq!(queue.take(), Some(0));
        assert!(queue.demand(4) && queue.demand(2) && queue.demand(4));
        assert!(!queue.demand(0), "it was taken");
        assert!(queue.is_demanded() && !queue.is_empty());
        let taken: Vec<_> = std::iter::from_fn(|| queue.take()).collect();
        assert_eq!(taken, [4, 2, 3, 5, 1]);
        assert!(!queue.demand(3) && queue.take().is_none());
        assert!(!queue.is_demanded() && queue.is_empty());
    }
}
