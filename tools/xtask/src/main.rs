//! The project's own commands: `cargo xtask --help`.

mod bench;
mod demo;
mod guests;
mod lab;
mod lint;
mod packages;
mod runner;
mod soak;
mod steps;
mod test;
mod workspace;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(bin_name = "cargo xtask", about = "The project's own commands")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Builds the guests and what emulated hosts run into target/guests
    Guests(guests::GuestsOptions),
    /// Boots a Linux guest, moves it under load, and shows that nothing was lost
    Demo(demo::DemoOptions),
    /// Checks formatting, clippy's advice, and the dependencies' licences, versions and sources
    Lint,
    /// Sets everything up and tests it: lint, unit tests, and the scenarios of both lanes
    Test(test::Options),
    /// Runs scenarios with long counts
    Soak(soak::Options),
    /// Measures, beside iperf3 and QEMU
    Bench(bench::Options),
    /// Starts emulated hosts and a shell on the first of them
    Lab(lab::Options),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Guests(options) => guests::build_all(&options).map(|_| ()),
        Command::Demo(options) => demo::run(&options),
        Command::Lint => lint::run_all(),
        Command::Test(options) => test::run(&options),
        Command::Soak(options) => soak::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Lab(options) => lab::shell(&options),
    }
}
