//! The workload agent of Linux guests: a heartbeat, memory and disk under load, and proof that nothing was lost.
//!
//! Every line on stdout is one event: `agent: <event> key=value…`. See `guests/DESIGN.md` for all of them.

mod commands;
mod console;
mod disk;
mod echo;
mod first;
mod forks;
mod heartbeat;
mod memory;
mod network;
mod physical;
mod ports;
mod power;
mod random;
mod report;
mod settings;
mod stream;

use std::sync::Arc;
use std::thread;

use report::AgentReport;
use settings::AgentSettings;

fn main() -> std::io::Result<()> {
    first::prepare()?;
    let line = std::fs::read_to_string("/proc/cmdline")?;
    let settings = AgentSettings::parse(&line);
    let report = Arc::new(AgentReport::default());
    if let Err(error) = console::take(&line) {
        report.error(format_args!("console expected=ours got={error}"));
    }
    for word in &settings.unknown {
        report.error(format_args!("word={word} expected=a setting got=nonsense"));
    }

    let memory = memory::start(settings.dirty_bytes, settings.base, settings.rate, report.clone());
    let disk = settings
        .disk
        .as_ref()
        .and_then(|device| disk::start(device, report.clone()));
    if let Some((address, prefix)) = settings.address
        && let Err(error) = network::set_up(address, prefix)
    {
        report.error(format_args!("address={address} expected=set got={error}"));
    }
    if let Some(peer) = settings.echo {
        stream::start(peer, report.clone());
    }
    if let Some(device) = settings.random {
        random::start(device, report.clone());
    }
    let workloads = Arc::new(commands::Workloads::new(memory, disk));
    workloads.wait_until_filled();
    let cpus = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let device = settings
        .disk
        .as_deref()
        .filter(|_| workloads.has_disk())
        .unwrap_or("-");
    report.line(format_args!(
        "ready cpus={cpus} dirty_mib={} disk={device}",
        settings.dirty_bytes >> 20
    ));

    echo::start(&report);
    ports::start(&report);
    power::watch(&report, &workloads);
    if let Err(error) = forks::watch(report.clone()) {
        report.error(format_args!("kmsg=open expected=a log got={error}"));
    }
    {
        let (report, workloads) = (report.clone(), workloads.clone());
        thread::spawn(move || commands::serve(std::io::stdin().lock(), &report, &workloads));
    }
    heartbeat::run(settings.tick, settings.print, &report)
}
