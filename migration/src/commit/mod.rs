//! Who may run the guest: the rules of the commit, without I/O.
//!
//! [`Ledger`] is the destination's knowledge, [`Claim`] the source's. Both only ever move as `PROTOCOL.md` draws
//! it under "Commit"; `model.rs` goes through what losses, crashes and late messages can make of the two.

mod claim;
mod ledger;
#[cfg(test)]
mod model;

pub(crate) use claim::{Claim, Ruling, Withdrawn};
pub(crate) use ledger::{Ledger, Stage};
