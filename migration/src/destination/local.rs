//! What this host provides for one migration that arrives. Holds references only, and decides nothing.

use std::sync::Arc;

use super::rendezvous::Rendezvous;
use crate::control::Control;
use crate::options::ReceiveOptions;
use crate::ports::Destination;

/// What the job and its parts work with on this host, as opposed to what comes from the source.
pub(super) struct LocalSide<'a> {
    /// Builds, restores and runs the machine.
    pub(super) destination: &'a mut dyn Destination,
    /// Brings connections, and holds the commit's ledger.
    pub(super) rendezvous: &'a Arc<Rendezvous>,
    /// Brings a cancel or an operator's decision, and shows how far the migration is.
    pub(super) control: &'a Control,
    pub(super) options: &'a ReceiveOptions,
}
