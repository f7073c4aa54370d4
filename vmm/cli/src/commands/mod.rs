//! The commands: a function each, which takes the command's arguments and returns how the program ends.

mod balloon;
mod client;
mod detach;
mod launch;
mod logs;
mod metrics;
mod migrate;
mod owner;
mod probe;
mod progress;
mod report;
mod snapshot;

use crate::Exit;
use crate::args::Command;

pub(crate) use report::OtherKind;

/// Does what a command says.
pub(crate) fn run(command: Command) -> anyhow::Result<Exit> {
    match command {
        Command::Run(args) => launch::run(*args),
        Command::Receive(args) => launch::receive(args),
        Command::Restore(args) => launch::restore(args),
        Command::Migrate(args) => migrate::run(args),
        Command::Snapshot(args) => snapshot::run(args),
        Command::Balloon(args) => balloon::run(&args),
        Command::Metrics(args) => metrics::run(&args),
        Command::Disk(args) => client::disk(&args),
        Command::Status(args) => client::status(&args),
        Command::Cancel(args) => client::cancel(&args),
        Command::Resolve(args) => client::resolve(&args),
        Command::Pause(args) => client::pause(&args),
        Command::Resume(args) => client::resume(&args),
        Command::Stop(args) => client::stop(&args),
        Command::Ps(args) => client::ps(&args),
        Command::Console(args) => client::console(&args),
        Command::Logs(args) => logs::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Probe(args) => probe::run(&args),
    }
}
