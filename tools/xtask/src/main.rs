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
    command: XtaskCommand,
}

#[derive(Subcommand)]
enum XtaskCommand {
    /// Builds the guests and what emulated hosts run into target/guests
    Guests(guests::GuestsOptions),
    /// Boots a Linux guest, moves it under load, and shows that nothing was lost
    Demo(demo::DemoOptions),
    /// Checks formatting, names, clippy's advice, and the dependencies' licences, versions and sources
    Lint,
    /// Sets everything up and tests it: lint, unit tests, and the scenarios of both lanes
    Test(test::TestOptions),
    /// Runs scenarios with long counts
    Soak(soak::SoakOptions),
    /// Measures, beside iperf3 and QEMU
    Bench(bench::BenchOptions),
    /// Starts emulated hosts and a shell on the first of them
    Lab(lab::LabOptions),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        XtaskCommand::Guests(options) => guests::build_all(&options).map(|_| ()),
        XtaskCommand::Demo(options) => demo::run(&options),
        XtaskCommand::Lint => lint::run_all(),
        XtaskCommand::Test(options) => test::run(&options),
        XtaskCommand::Soak(options) => soak::run(&options),
        XtaskCommand::Bench(options) => bench::run(&options),
        XtaskCommand::Lab(options) => lab::shell(&options),
    }
}
