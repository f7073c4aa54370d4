//! `cargo xtask soak`: the scenarios whose promise is a count.

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::runner::{Lane, has_kvm, prepare};
use crate::steps::Steps;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// What to run; all of them if nothing is named
    #[arg(value_enum)]
    scenarios: Vec<Scenario>,
    /// How often instead of as often as promised
    #[arg(long)]
    count: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// A bare guest of 2 GiB that dirties 100 MiB/s moves 50 times, with one vCPU and with four
    Moves,
    /// 200 faults at random messages: either side killed, messages lost, changed or doubled, the network gone
    Faults,
    /// The destination is killed 50 times at random moments
    Kills,
    /// A Debian guest with a disk under load moves 10 times between emulated hosts
    Lab,
    /// A Debian guest that uses disk, network, sockets and balloon at once moves 20 times between emulated hosts
    Together,
    /// Every property of devices and decoders with a million random cases
    Fuzz,
}

impl Scenario {
    fn lane(self) -> Lane {
        if matches!(self, Self::Lab | Self::Together) {
            Lane::Lab
        } else {
            Lane::Direct
        }
    }

    /// The part of the tests' names that selects it.
    fn filter(self) -> &'static str {
        match self {
            Self::Moves => "back_and_forth_with",
            Self::Faults => "any_fault_at_any_message",
            Self::Kills => "a_killed_destination",
            Self::Lab => "a_debian_guest_back_and_forth",
            Self::Together => "everything_at_once",
            Self::Fuzz => "any_",
        }
    }

    /// What the tests read from their environment.
    fn settings(self, count: Option<u32>) -> Vec<(&'static str, String)> {
        let promised = match self {
            Self::Moves | Self::Kills => 50,
            Self::Faults => 200,
            Self::Lab => 10,
            Self::Together => 20,
            Self::Fuzz => 1_000_000,
        };
        let name = if self == Self::Fuzz {
            "PROPTEST_CASES"
        } else {
            "GODWIT_COUNT"
        };
        let mut settings = vec![(name, count.unwrap_or(promised).to_string())];
        if self == Self::Moves {
            settings.push(("GODWIT_MEMORY_MIB", "2048".into()));
        }
        settings
    }
}

/// Runs them one after the other.
pub(crate) fn run(options: &Options) -> Result<()> {
    let chosen = if options.scenarios.is_empty() {
        Scenario::value_variants()
    } else {
        &options.scenarios
    };
    if !has_kvm() && chosen.iter().any(|scenario| scenario.lane() == Lane::Direct) {
        bail!("this machine has no /dev/kvm: only `cargo xtask soak lab` can run here");
    }
    let mut steps = Steps::default();
    let prepared = steps.need("set-up", prepare)?;
    for scenario in chosen {
        let settings = scenario.settings(options.count);
        steps.tests(scenario.filter(), || match scenario {
            Scenario::Fuzz => prepared.properties(scenario.filter(), &settings),
            _ => prepared.scenarios(scenario.lane(), Some(scenario.filter()), &settings),
        });
    }
    steps.finish()
}
