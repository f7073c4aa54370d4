//! `cargo xtask soak`: the scenarios whose promise is a count, and all of them on a slow machine.

mod quota;
mod slow;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::runner::{TestLane, has_kvm, prepare};
use crate::steps::Steps;

#[derive(clap::Args)]
pub(crate) struct SoakOptions {
    /// What to run; all of them if nothing is named
    #[arg(value_enum)]
    scenarios: Vec<Scenario>,
    /// How often instead of as often as promised
    #[arg(long)]
    count: Option<u32>,
    /// Of `slow`: run only tests whose name contains this
    #[arg(long)]
    filter: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// A bare guest of 2 GiB that dirties 100 MiB/s moves 50 times, with one vCPU and with four
    Moves,
    /// 400 faults at random messages: either side killed, messages lost, changed or doubled, the network gone, slow or
    /// silent, logs that nobody reads, what a guest needs, its memory included, taken away
    Faults,
    /// The destination is killed 50 times at random moments
    Kills,
    /// A Debian guest with a disk under load moves 10 times between emulated hosts
    Lab,
    /// A Debian guest that uses disk, network, sockets and balloon at once moves 20 times between emulated hosts
    Together,
    /// All scenarios of both lanes, while the emulators and every godwit together have a third of the machine's CPU time
    Slow,
    /// Every property of devices and decoders with a million random cases
    Fuzz,
}

/// Random cases of each property.
const CASES: u32 = 1_000_000;

/// A scenario that repeats something, as often as promised.
struct Repeated {
    lane: TestLane,
    /// The part of the tests' names that selects it.
    filter: &'static str,
    count: u32,
    memory_mib: Option<u32>,
}

impl Scenario {
    fn repeated(self) -> Option<Repeated> {
        let (lane, filter, count) = match self {
            Self::Moves => (TestLane::Direct, "back_and_forth_with", 50),
            Self::Faults => (TestLane::Direct, "any_fault_at_any_message", 400),
            Self::Kills => (TestLane::Direct, "a_killed_destination", 50),
            Self::Lab => (TestLane::Lab, "a_debian_guest_back_and_forth", 10),
            Self::Together => (TestLane::Lab, "everything_at_once", 20),
            Self::Slow | Self::Fuzz => return None,
        };
        Some(Repeated {
            lane,
            filter,
            count,
            memory_mib: (self == Self::Moves).then_some(2048),
        })
    }
}

impl Repeated {
    /// What the tests read from their environment.
    fn settings(&self, count: Option<u32>) -> Vec<(&'static str, String)> {
        let memory = self.memory_mib.map(|mib| ("GODWIT_MEMORY_MIB", mib.to_string()));
        let count = ("GODWIT_COUNT", count.unwrap_or(self.count).to_string());
        [count].into_iter().chain(memory).collect()
    }
}

/// Runs them one after the other.
pub(crate) fn run(options: &SoakOptions) -> Result<()> {
    let chosen = if options.scenarios.is_empty() {
        Scenario::value_variants()
    } else {
        &options.scenarios
    };
    let is_direct = |repeated: Repeated| repeated.lane == TestLane::Direct;
    if !has_kvm()
        && chosen
            .iter()
            .any(|scenario| scenario.repeated().is_some_and(is_direct))
    {
        bail!("this machine has no /dev/kvm: only `cargo xtask soak lab together slow fuzz` can run here");
    }
    let mut steps = Steps::default();
    let prepared = steps.need("set-up", prepare)?;
    for scenario in chosen {
        match scenario.repeated() {
            Some(repeated) => steps.tests(repeated.filter, || {
                let settings = repeated.settings(options.count);
                prepared.scenarios(repeated.lane, Some(repeated.filter), &settings)
            }),
            None if *scenario == Scenario::Slow => {
                slow::run(&mut steps, &prepared, options.filter.as_deref())?;
            }
            None => steps.tests("properties", || {
                let cases = options.count.unwrap_or(CASES).to_string();
                prepared.properties("any_", &[("PROPTEST_CASES", cases)])
            }),
        }
    }
    steps.finish()
}
