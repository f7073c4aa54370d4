//! Which blocks of a disk were written while a migration mirrors it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// Bytes of a block: as many as of a page, the unit of a migration.
const BLOCK_SIZE: u64 = 4096;

/// A bit for each block of a disk: set by a write, cleared by the migration before it reads the block.
#[derive(Debug)]
pub struct BlockLog {
    words: Vec<AtomicU64>,
}

impl BlockLog {
    /// A log without marks, for a disk of so many bytes.
    pub(super) fn new(size: u64) -> Self {
        let words = size.div_ceil(BLOCK_SIZE).div_ceil(64);
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// The marks: bit n of word m is block `64 m + n`.
    pub fn marked(&self) -> Vec<u64> {
        self.words
            .iter()
            .map(|word| word.load(Ordering::Acquire))
            .collect()
    }

    /// Clears the marks that are set in `words`, which begin at block `first`, a multiple of 64. A read of those blocks
    /// afterwards sees the writes that had set the marks.
    pub fn clear(&self, first: u64, words: &[u64]) {
        let from = usize::try_from(first / 64).unwrap_or(usize::MAX);
        for (mark, word) in self.words.iter().skip(from).zip(words) {
            mark.fetch_and(!word, Ordering::AcqRel);
        }
    }

    /// Marks every block that a range touches, after the range was written.
    fn mark(&self, offset: u64, len: u64) {
        let Some(last) = offset.checked_add(len).and_then(|end| end.checked_sub(1)) else {
            return;
        };
        for block in offset / BLOCK_SIZE..=last / BLOCK_SIZE {
            let Some(word) = self.words.get((block / 64) as usize) else {
                return;
            };
            word.fetch_or(1 << (block % 64), Ordering::AcqRel);
        }
    }
}

/// The current log of a disk, if there is one.
#[derive(Debug, Default)]
pub(super) struct CurrentBlockLog(RwLock<Option<Arc<BlockLog>>>);

impl CurrentBlockLog {
    /// Starts a log for a disk of so many bytes, in place of an earlier one.
    pub(super) fn start(&self, size: u64) -> Arc<BlockLog> {
        let log = Arc::new(BlockLog::new(size));
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(log.clone());
        log
    }

    /// Ends the log: nothing is marked in it any more.
    pub(super) fn stop(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Marks a range that was written, or may have been.
    pub(super) fn written(&self, offset: u64, len: u64) {
        if let Some(log) = &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            log.mark(offset, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_marks_every_block_that_it_touches() {
        let logging = CurrentBlockLog::default();
        logging.written(0, 512);
        let log = logging.start(200 * BLOCK_SIZE + 512);
        assert_eq!(log.marked(), [0; 4], "what was written before is not in the log");
        logging.written(4095, 2);
        logging.written(63 * BLOCK_SIZE, 2 * BLOCK_SIZE);
        logging.written(200 * BLOCK_SIZE, 512);
        logging.written(u64::MAX - 5, 100);
        logging.written(1 << 40, 512);
        logging.written(300, 0);
        assert_eq!(log.marked(), [1 << 63 | 3, 1, 0, 1 << 8]);
        log.clear(0, &[1 << 63 | 1 << 7]);
        log.clear(192, &[u64::MAX, u64::MAX]);
        assert_eq!(log.marked(), [3, 1, 0, 0]);
        logging.stop();
        logging.written(8192, 512);
        assert_eq!(log.marked(), [3, 1, 0, 0]);
    }
}
