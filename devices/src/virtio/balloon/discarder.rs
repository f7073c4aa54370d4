//! What the helper thread does for a balloon: it gives pages of the guest back to the host.

use std::sync::Arc;

use super::PAGE_SIZE;
use super::control::BalloonControl;
use super::discard::{DiscardError, discard};
use crate::GuestMemory;
use crate::helper::CancelFlag;
use crate::log_damper::LogDamper;
use crate::virtio::Chain;

/// Most pages that one request gives up, four times as many as Linux puts in one. The other pages of a longer request
/// are not given up.
pub(super) const MAX_PAGES: usize = 1024;

/// What a queue of the balloon is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BalloonRole {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
}

/// The parts of a balloon that the helper thread uses.
#[derive(Debug)]
pub(super) struct PageDiscarder {
    pub(super) control: Arc<BalloonControl>,
    pub(super) warnings: LogDamper,
}

impl PageDiscarder {
    pub(super) fn discard_chain(
        &self,
        role: BalloonRole,
        memory: &GuestMemory,
        chain: Chain,
        cancelled: &CancelFlag,
    ) {
        match role {
            BalloonRole::Reporting => self.discard_reported(memory, &chain, cancelled),
            _ => self.discard_listed(memory, chain, cancelled),
        }
    }

    /// Gives up the pages that a chain of the inflate queue lists by number.
    fn discard_listed(&self, memory: &GuestMemory, mut chain: Chain, cancelled: &CancelFlag) {
        let mut bytes = [0; 4 * MAX_PAGES];
        let got = match chain.readable.read(memory, &mut bytes) {
            Ok(got) => got,
            Err(error) => {
                return self.warn(&error);
            }
        };
        let (numbers, _) = bytes[..got].as_chunks();
        let mut pages: Vec<u64> = numbers
            .iter()
            .map(|number| u64::from(u32::from_le_bytes(*number)))
            .collect();
        pages.sort_unstable();
        pages.dedup();
        // Runs of pages in one call each.
        for run in pages.chunk_by(|page, next| page + 1 == *next) {
            if cancelled.is_set() {
                return;
            }
            self.discard_range(memory, run[0] * PAGE_SIZE, run.len() as u64 * PAGE_SIZE);
        }
        let bytes = pages.len() as u64 * PAGE_SIZE;
        self.control.metrics.inflated_bytes.add(bytes);
    }

    /// Gives up the pages that are the buffers of a reporting chain; the guest does not use them until it has the chain
    /// back. If the guest poisons free pages it expects their content (virtio 1.2, 5.5.6.8), and none is given up.
    fn discard_reported(&self, memory: &GuestMemory, chain: &Chain, cancelled: &CancelFlag) {
        if !self.control.status().reads_zero() {
            return;
        }
        self.control.metrics.reported_bytes.add(chain.writable.len());
        for (address, len) in chain.writable.iter() {
            if cancelled.is_set() {
                return;
            }
            self.discard_range(memory, address.0, len.into());
        }
    }

    fn discard_range(&self, memory: &GuestMemory, gpa: u64, len: u64) {
        match discard(memory, gpa, len, &self.control.replaced) {
            Ok(bytes) => self.control.metrics.discarded_bytes.add(bytes),
            Err(error @ (DiscardError::Outside(_) | DiscardError::Host(_))) => self.warn(&error),
        }
    }

    pub(super) fn warn(&self, error: &dyn std::error::Error) {
        if let Some(count) = self.warnings.count() {
            let cause = error.source().map(ToString::to_string).unwrap_or_default();
            tracing::warn!(
                count,
                cause,
                "virtio-balloon: request not served in full: {error}"
            );
        }
    }
}
