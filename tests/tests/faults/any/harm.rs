//! Harm that is done when a message passes.

use fault_proxy::{FramePart, NetworkPace, ProxyFault, When};
use rustix::process::{Pid, Signal, kill_process};
use tests::Vm;

use super::dependent::Thing;

/// The harm that is done when the message passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InjectedHarm {
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
    /// From then on nothing passes, and neither side gets an error.
    Silence,
    /// Something outside that the guest needs goes.
    Lose(Thing),
}

pub(super) const HARMS: [InjectedHarm; 16] = [
    InjectedHarm::KillSource(When::Before),
    InjectedHarm::KillSource(When::After),
    InjectedHarm::KillDestination(When::Before),
    InjectedHarm::KillDestination(When::After),
    InjectedHarm::Drop,
    InjectedHarm::Truncate,
    InjectedHarm::Corrupt,
    InjectedHarm::Duplicate,
    InjectedHarm::Reset,
    InjectedHarm::Stall,
    InjectedHarm::CutAll,
    InjectedHarm::Trickle,
    InjectedHarm::Silence,
    InjectedHarm::Lose(Thing::Handler),
    InjectedHarm::Lose(Thing::Memory),
    InjectedHarm::Lose(Thing::Disk),
];

/// Bytes per second of a network that is as good as dead.
const TRICKLE: u64 = 4000;

impl InjectedHarm {
    /// The fault that does it. `lose` takes away what the guest needs.
    pub(super) fn fault(self, source: &Vm, destination: &Vm, lose: Box<dyn FnOnce() + Send>) -> ProxyFault {
        let kill = |vm: &Vm, when| {
            let id = vm.process.id();
            ProxyFault::Call(when, Box::new(move || kill(id)))
        };
        match self {
            Self::KillSource(when) => kill(source, when),
            Self::KillDestination(when) => kill(destination, when),
            Self::Drop => ProxyFault::Drop,
            Self::Truncate => ProxyFault::Truncate,
            Self::Corrupt => ProxyFault::Corrupt(FramePart::Kind),
            Self::Duplicate => ProxyFault::Duplicate,
            Self::Reset => ProxyFault::Reset,
            Self::Stall => ProxyFault::Stall(None),
            Self::CutAll => ProxyFault::CutAll,
            Self::Trickle => ProxyFault::Pace(NetworkPace::Bytes(TRICKLE)),
            Self::Silence => ProxyFault::Pace(NetworkPace::Bytes(0)),
            Self::Lose(_) => ProxyFault::Call(When::Before, lose),
        }
    }

    /// How the guest is migrated. On a network that only trickles, the move has a deadline: without one it would not end.
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
    // The process may be ending by itself; as its parent has not waited for it, its number is still its own.
    if let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::KILL);
    }
}
