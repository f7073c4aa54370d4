//! What is done to a message.

use std::sync::Arc;
use std::time::Duration;

use fault_proxy::{Fault, Part, When};

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
    Corrupt(Part),
    Duplicate,
    Reset,
    Stall,
    CutAll,
    CancelSource,
    CancelDestination,
}

/// Each of them; [`Part::Data`] is for pages alone.
pub(super) const HARMS: [Harm; 14] = [
    Harm::Drop,
    Harm::Late,
    Harm::TooLate,
    Harm::Truncate,
    Harm::Corrupt(Part::Kind),
    Harm::Corrupt(Part::Length),
    Harm::Corrupt(Part::Content),
    Harm::Corrupt(Part::Data),
    Harm::Duplicate,
    Harm::Reset,
    Harm::Stall,
    Harm::CutAll,
    Harm::CancelSource,
    Harm::CancelDestination,
];

impl Harm {
    pub(super) fn fault(self, here: &Arc<Control>, there: &Arc<Control>) -> Fault {
        let cancel = |control: &Arc<Control>| {
            let control = control.clone();
            Fault::Call(When::Before, Box::new(move || control.cancel()))
        };
        match self {
            Harm::Drop => Fault::Drop,
            Harm::Late => Fault::Delay(Duration::from_millis(60)),
            Harm::TooLate => Fault::Delay(Duration::from_millis(1200)),
            Harm::Truncate => Fault::Truncate,
            Harm::Corrupt(part) => Fault::Corrupt(part),
            Harm::Duplicate => Fault::Duplicate,
            Harm::Reset => Fault::Reset,
            Harm::Stall => Fault::Stall(None),
            Harm::CutAll => Fault::CutAll,
            Harm::CancelSource => cancel(here),
            Harm::CancelDestination => cancel(there),
        }
    }

    /// Whether somebody asks for the end.
    pub(super) fn cancels(self) -> bool {
        matches!(self, Harm::CancelSource | Harm::CancelDestination)
    }
}
