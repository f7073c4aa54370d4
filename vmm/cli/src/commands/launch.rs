//! `run`, `receive` and `restore`: the commands that become a VM.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use api::rundir::{ApiSocket, check_name};
use devices::GuestExit;
use migration::{MemoryKind, ReceiveOptions, Receiver};
use output::{self, start_log};
use vmm::config::{ConfigError, RequestedConfig};
use vmm::console::Console;
use vmm::cpu::Template;
use vmm::footprint::release_text;
use vmm::machine::{
    BalloonConfig, ConsoleConfig, Machine, MigrationDestination, SnapshotClocks, SnapshotMemory,
};
use vmm::memory::{self, FaultHandler};
use vmm::privacy::keep_memory_private;
use vmm::server::ApiServer;
use vmm::snapshot::Snapshot;
use vmm::supervisor::{Boot, Ending, RestoreWait, Supervisor, SupervisorHandle};

use super::detach::{DetachedPart, Launch, detach};
use super::snapshot::with_bar;
use crate::Exit;
use crate::args::{
    ClockArg, CommonArgs, ConsoleArg, OnResetArg, ReceiveArgs, RestoreArgs, RestoreMemoryArgs, RunArgs,
};
use crate::process::lost_memory::end_in_order;
use crate::process::resources::raise_file_limit;
use crate::process::signals::{HeldSignals, outlive_file_size_limit, stay_with_the_terminal};
use crate::process::stdin::forward_stdin;
use crate::report::figures::duration;

pub(super) fn run(args: RunArgs) -> anyhow::Result<Exit> {
    let mut launch = match begin(&args.common)? {
        DetachedPart::Vm(launch) => launch,
        DetachedPart::Starter(exit) => return Ok(exit),
    };
    let file = args
        .config_file
        .as_deref()
        .map(RequestedConfig::from_file)
        .transpose()?;
    let mut config = file.unwrap_or_default().overridden_by(requested(&args)).check()?;
    if args.on_reset == OnResetArg::Reboot {
        config.make_repeatable()?;
    }
    if let Some(reason) = config.template_reason {
        tracing::info!("CPU template {} ({reason})", config.template);
    } else {
        tracing::info!("CPU template {}", config.template);
    }
    let Startup {
        name,
        held,
        socket,
        console,
        mut supervisor,
    } = prepare(&args.common, &mut launch)?;
    let boot: Boot = {
        let console = console.clone();
        Arc::new(move |events| Machine::boot(&config, &console, events))
    };
    let machine = boot(supervisor.event_sink())?;
    let server = ApiServer::start(socket, supervisor.handle(), console).context("API server")?;
    drop(held);
    machine.start();
    supervisor.adopt(machine, &server);
    if args.on_reset == OnResetArg::Reboot {
        supervisor.boot_on_reset(boot);
    }
    release_text();
    launch.up(&name);
    supervise(supervisor, server)
}

pub(super) fn receive(args: ReceiveArgs) -> anyhow::Result<Exit> {
    let mut launch = match begin(&args.common)? {
        DetachedPart::Vm(launch) => launch,
        DetachedPart::Starter(exit) => return Ok(exit),
    };
    let listen = args.listen.resolve()?;
    let arrival = args.backends.arrival(args.max_memory, args.reserve)?;
    if let Some(reserve) = args.reserve {
        memory::check_size(reserve).map_err(ConfigError::from)?;
    }
    let Startup {
        name,
        held,
        socket,
        console,
        mut supervisor,
    } = prepare(&args.common, &mut launch)?;
    let destination = MigrationDestination::new(arrival, console.clone(), supervisor.event_sink())?;
    let receiver = Receiver::listen(&listen, ReceiveOptions::default())?;
    let server = ApiServer::start(socket, supervisor.handle(), console).context("API server")?;
    drop(held);
    // Scripts wait for this line.
    output::print_line(&format!("{name} is listening on {}", receiver.endpoint()));
    supervisor.receive(receiver, destination).context("receive job")?;
    launch.up(&name);
    supervise(supervisor, server)
}

pub(super) fn restore(args: RestoreArgs) -> anyhow::Result<Exit> {
    let mut launch = match begin(&args.common)? {
        DetachedPart::Vm(launch) => launch,
        DetachedPart::Starter(exit) => return Ok(exit),
    };
    let arrival = args.backends.arrival(None, None)?;
    let name = checked_name(&args.common)?;
    let console = open_console(&launch)?;
    let mut supervisor = new_supervisor(&args.common, &name, &console);
    let destination = MigrationDestination::new(arrival, console.clone(), supervisor.event_sink())?;
    let snapshot = Snapshot::open(&args.directory)?;
    destination.check_all(snapshot.machine())?;
    // May take long, and leaves nothing behind: a signal may end it where it stands.
    let memory = snapshot_memory(&snapshot, &args.memory, supervisor.handle())?;
    end_in_order();
    let held = HeldSignals::hold();
    let socket = bind(&args.common, &name)?;
    supervisor.set_log(launch.named()?);
    let server = ApiServer::start(socket, supervisor.handle(), console).context("API server")?;
    drop(held);
    let (clocks, clocks_go_on) = restored_clocks(args.clock, snapshot.age());
    let after = if args.resume {
        "runs".into()
    } else {
        format!("is paused; `godwit resume {name}` lets it go on")
    };
    // Scripts wait for this line.
    let announcement = format!("{name} is restored and {after}; its clocks go on {clocks_go_on}");
    let wait = match memory {
        SnapshotMemory::Handled(..) | SnapshotMemory::Prefetched(..) => RestoreWait::Endless,
        SnapshotMemory::Mapped(_) | SnapshotMemory::Read(_) => RestoreWait::Bounded,
    };
    let restore = move || destination.restore_snapshot(&snapshot, memory, clocks, args.resume);
    supervisor
        .restore(restore, wait, move || {
            output::print_line(&announcement);
            launch.up(&name);
        })
        .context("restore job")?;
    supervise(supervisor, server)
}

/// What the clocks of a guest do that was saved so long ago, as a setting and as a sentence.
fn restored_clocks(asked: ClockArg, age: Duration) -> (SnapshotClocks, String) {
    match asked {
        ClockArg::Keep => {
            if Template::probe().0 == Template::Pvm {
                tracing::warn!(
                    "KVM here is kvm-pvm: guests read the host's own TSC, so only clocks that they get from KVM \
                     (kvm-clock) are kept"
                );
            }
            (SnapshotClocks::Keep, "where they stood".into())
        }
        ClockArg::Advance => {
            if age.is_zero() {
                tracing::warn!(
                    "the snapshot is from the future of this host's clock: the guest's clocks go on where they stood"
                );
            }
            let by = format!("by {}", duration(age.as_secs_f64() * 1e3));
            (SnapshotClocks::Advance, by)
        }
    }
}

fn snapshot_memory(
    snapshot: &Snapshot,
    args: &RestoreMemoryArgs,
    supervisor: SupervisorHandle,
) -> anyhow::Result<SnapshotMemory> {
    if let Some(socket) = &args.uffd {
        // No signal shall find a thread that it could end the process from.
        let _held = HeldSignals::hold();
        let memory = snapshot.without_pages()?;
        let on_gone = move || supervisor.fault_handler_gone();
        let handler = FaultHandler::connect(socket, &memory, on_gone)?;
        return Ok(SnapshotMemory::Handled(memory, handler));
    }
    // Other processes could not share what is mapped from a file for this one alone.
    let kind = snapshot.machine().memory_kind;
    let shared = kind == MemoryKind::Shared;
    if args.prefetch && !shared {
        let _held = HeldSignals::hold();
        let on_failed = move |reason| supervisor.pages_missing(reason);
        let (memory, prefetch) = snapshot.prefetch(on_failed)?;
        return Ok(SnapshotMemory::Prefetched(memory, prefetch));
    }
    if !args.preload && !shared {
        return Ok(SnapshotMemory::Mapped(snapshot.map()?));
    }
    Ok(SnapshotMemory::Read(with_bar(|watch| {
        snapshot.read(kind, watch)
    })?))
}

fn supervise(supervisor: Supervisor, server: ApiServer) -> anyhow::Result<Exit> {
    outlive_file_size_limit();
    end_in_order();
    let terminal = forward_stdin(&server, supervisor.handle())?;
    let ending = supervisor.run(server);
    if let Some(terminal) = terminal {
        terminal.restore();
    }
    Ok(log_ending(&ending?))
}

/// Logs how a VM ended.
fn log_ending(ending: &Ending) -> Exit {
    match ending {
        Ending::Guest(GuestExit::Panic) => {
            tracing::error!("the guest panicked");
            return Exit::GuestFailed;
        }
        Ending::TripleFault(vcpu) => {
            tracing::error!("the guest ended with a triple fault of vCPU {vcpu}");
            return Exit::GuestFailed;
        }
        Ending::Guest(GuestExit::Reset) => tracing::info!("the guest ended: it reset"),
        Ending::Guest(GuestExit::PowerOff) => tracing::info!("the guest ended: it powered itself off"),
        Ending::Stopped => tracing::info!("stopped"),
        Ending::Saved => tracing::info!("saved: the guest is in the snapshot"),
        Ending::Moved => tracing::info!("moved: the guest runs at the destination"),
    }
    Exit::Done
}

/// Leaves the terminal, if that is wanted, and opens the log.
fn begin(common: &CommonArgs) -> anyhow::Result<DetachedPart> {
    let part = detach(common)?;
    if let DetachedPart::Vm(launch) = &part {
        stay_with_the_terminal();
        start_log(launch.log())?;
        raise_file_limit();
        keep_memory_private()?;
    }
    Ok(part)
}

/// What `run` and `receive` have before they have a machine.
struct Startup {
    name: String,
    /// Holds signals back until the API is served.
    held: HeldSignals,
    socket: ApiSocket,
    console: Console,
    supervisor: Supervisor,
}

/// Takes the VM's name and its API socket, and makes the supervisor.
fn prepare(common: &CommonArgs, launch: &mut Launch) -> anyhow::Result<Startup> {
    let name = checked_name(common)?;
    let held = HeldSignals::hold();
    let socket = bind(common, &name)?;
    let log = launch.named()?;
    let console = open_console(launch)?;
    let mut supervisor = new_supervisor(common, &name, &console);
    supervisor.set_log(log);
    Ok(Startup {
        name,
        held,
        socket,
        console,
        supervisor,
    })
}

fn open_console(launch: &Launch) -> anyhow::Result<Console> {
    if launch.is_detached() {
        return Ok(Console::detached());
    }
    Console::to_stdout().context("console")
}

/// A supervisor that gets an event for every thread that fails.
fn new_supervisor(common: &CommonArgs, name: &str, console: &Console) -> Supervisor {
    let mut supervisor = Supervisor::new(name, console.clone());
    let handle = supervisor.handle();
    threads::report_failures_to(move |failure| handle.thread_failed(failure));
    supervisor.set_stop_timeout(common.stop_timeout);
    supervisor
}

fn requested(args: &RunArgs) -> RequestedConfig {
    RequestedConfig {
        kernel: args.kernel.clone(),
        initrd: args.initrd.clone(),
        cmdline: args.cmdline.clone(),
        root: None,
        cpus: args.cpus,
        memory: args.memory,
        shared_memory: args.shared_memory,
        huge_pages: args.huge_pages,
        prealloc: args.prealloc,
        dirty_ring: args.dirty_ring,
        cpu_template: args.cpu_template.clone(),
        disks: args.devices.disks(),
        nets: args.devices.nets(),
        balloon: args.balloon.map(|bytes| BalloonConfig {
            bytes,
            deflate_on_oom: true,
        }),
        vsock: args.vsock.clone(),
        rng_limits: args.rng,
        console: ConsoleConfig {
            has_terminal: args.console == ConsoleArg::Virtio,
            ports: args.ports.clone(),
        },
    }
}

pub(super) fn checked_name(common: &CommonArgs) -> anyhow::Result<String> {
    let name = common
        .name
        .clone()
        .unwrap_or_else(|| format!("vm-{}", std::process::id()));
    check_name(&name)?;
    Ok(name)
}

fn bind(common: &CommonArgs, name: &str) -> anyhow::Result<ApiSocket> {
    Ok(match &common.api_sock {
        Some(path) => ApiSocket::bind(path)?,
        None => ApiSocket::for_name(name)?,
    })
}
