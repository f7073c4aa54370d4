//! The project's own commands: `cargo xtask --help`.

mod guests;
mod lab;
mod packages;
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
    Guests(guests::Options),
    /// Starts emulated hosts and a shell on the first of them
    Lab(lab::Options),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Guests(options) => guests::build(&options).map(|_| ()),
        Command::Lab(options) => lab::shell(&options),
    }
}
