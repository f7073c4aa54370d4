//! What is done to a message.

use std::sync::Arc;
use std::time::Duration;

use fault_proxy::{FramePart, ProxyFault, When};

use crate::Control;

/// A fault, as often as it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Harm {
    Drop,
    /// Within the time-outs.
    Late,
    /// Later than any time-out.
    TooLate,
    Truncate,
    Corrupt(FramePart),
    Duplicate,
    Reset,
    Stall,
    CutAll,
    CancelSource,
    CancelDestination,
}

/// Each of them; [`FramePart::Data`] is for pages alone.
pub(super) const HARMS: [Harm; 14] = [
    Harm::Drop,
    Harm::Late,
    Harm::TooLate,
    Harm::Truncate,
    Harm::Corrupt(FramePart::Kind),
    Harm::Corrupt(FramePart::Length),
    Harm::Corrupt(FramePart::Content),
    Harm::Corrupt(FramePart::Data),
    Harm::Duplicate,
    Harm::Reset,
    Harm::Stall,
    Harm::CutAll,
    Harm::CancelSource,
    Harm::CancelDestination,
];

impl Harm {
    pub(super) fn fault(self, here: &Arc<Control>, there: &Arc<Control>) -> ProxyFault {
        let cancel = |control: &Arc<Control>| {
            let control = control.clone();
            ProxyFault::Call(When::Before, Box::new(move || control.cancel()))
        };
        match self {
            Harm::Drop => ProxyFault::Drop,
            Harm::Late => ProxyFault::Delay(Duration::from_millis(60)),
            Harm::TooLate => ProxyFault::Delay(Duration::from_millis(1200)),
            Harm::Truncate => ProxyFault::Truncate,
            Harm::Corrupt(part) => ProxyFault::Corrupt(part),
            Harm::Duplicate => ProxyFault::Duplicate,
            Harm::Reset => ProxyFault::Reset,
            Harm::Stall => ProxyFault::Stall(None),
            Harm::CutAll => ProxyFault::CutAll,
            Harm::CancelSource => cancel(here),
            Harm::CancelDestination => cancel(there),
        }
    }

    /// Whether one side is cancelled.
    pub(super) fn cancels(self) -> bool {
        matches!(self, Harm::CancelSource | Harm::CancelDestination)
    }
}
