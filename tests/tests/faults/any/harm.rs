//! What happens at a message.

use fault_proxy::{Fault, Pace, Part, When};
use rustix::process::{Pid, Signal, kill_process};
use tests::Vm;

use super::dependent::Thing;

/// What happens when the message passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Harm {
    KillSource(When),
    KillDestination(When),
    Drop,
    Truncate,
    Corrupt,
    Duplicate,
    Reset,
    Stall,
    CutAll,
    /// From then on a network of a few bytes a second.
    Trickle,
    /// From then on nothing passes, and nobody is told.
    Silence,
    /// Something outside that the guest needs goes.
    Lose(Thing),
}

pub(super) const HARMS: [Harm; 16] = [
    Harm::KillSource(When::Before),
    Harm::KillSource(When::After),
    Harm::KillDestination(When::Before),
    Harm::KillDestination(When::After),
    Harm::Drop,
    Harm::Truncate,
    Harm::Corrupt,
    Harm::Duplicate,
    Harm::Reset,
    Harm::Stall,
    Harm::CutAll,
    Harm::Trickle,
    Harm::Silence,
    Harm::Lose(Thing::Handler),
    Harm::Lose(Thing::Memory),
    Harm::Lose(Thing::Disk),
];

/// Bytes per second of a network that is as good as dead.
const TRICKLE: u64 = 4000;

impl Harm {
    /// The fault that does it. `lose` takes away what the guest needs.
    pub(super) fn fault(self, source: &Vm, destination: &Vm, lose: Box<dyn FnOnce() + Send>) -> Fault {
        let kill = |vm: &Vm, when| {
            let id = vm.process.id();
            Fault::Call(when, Box::new(move || kill(id)))
        };
        match self {
            Self::KillSource(when) => kill(source, when),
            Self::KillDestination(when) => kill(destination, when),
            Self::Drop => Fault::Drop,
            Self::Truncate => Fault::Truncate,
            Self::Corrupt => Fault::Corrupt(Part::Kind),
            Self::Duplicate => Fault::Duplicate,
            Self::Reset => Fault::Reset,
            Self::Stall => Fault::Stall(None),
            Self::CutAll => Fault::CutAll,
            Self::Trickle => Fault::Pace(Pace::Bytes(TRICKLE)),
            Self::Silence => Fault::Pace(Pace::Bytes(0)),
            Self::Lose(_) => Fault::Call(When::Before, lose),
        }
    }

    /// How the guest is migrated. On a network that only trickles a move without an end would take one.
    pub(super) fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Trickle => &[
                "--on-miss",
                "fail",
                "--max-downtime",
                "1s",
                "--deadline",
                "20s",
                "--verify",
            ],
            _ => &super::VERIFIED,
        }
    }
}

/// Kills a process.
pub(super) fn kill(id: u32) {
    // It may be on its way out by itself; as a child that nobody has waited for, its number is still its own.
    if let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::KILL);
    }
}
