//! `run`, `receive` and `restore`: the commands that become a VM.

use std::io::{self, Read};
use std::path::Path;

use anyhow::Context;
use migration::{MemoryKind, ReceiveOptions, Receiver};

use super::Exit;
use super::args::{CommonArgs, ConsoleArg, ReceiveArgs, RestoreArgs, RunArgs};
use super::signals::{Held, outlive_file_size_limit};
use super::snapshot::with_bar;
use super::terminal::{ESCAPE, RawTerminal};
use crate::api::ApiServer;
use crate::config::{BalloonConfig, ConfigError, ConsoleConfig, Wishes};
use crate::console::{Console, ConsoleInput};
use crate::footprint::give_back_text;
use crate::machine::{Machine, MigrationDestination, SnapshotMemory};
use crate::memory::{self, FaultHandler};
use crate::output::{self, start_log};
use crate::privacy::keep_memory_private;
use crate::report::figures::duration;
use crate::rundir::{ApiSocket, check_name};
use crate::snapshot::Snapshot;
use crate::supervisor::{Ending, Event, Supervisor, SupervisorHandle};

pub(super) fn run(args: RunArgs) -> anyhow::Result<Exit> {
    start_log(args.common.log.as_deref())?;
    keep_memory_private()?;
    let file = args.config_file.as_deref().map(Wishes::from_file).transpose()?;
    let config = file.unwrap_or_default().overridden_by(wishes(&args)).check()?;
    if let Some(reason) = config.template_reason {
        tracing::info!("CPU template {} ({reason})", config.template);
    } else {
        tracing::info!("CPU template {}", config.template);
    }
    let name = checked_name(&args.common)?;
    let held = Held::hold();
    let socket = bind(&args.common, &name)?;
    let console = Console::to_stdout().context("console")?;
    let mut supervisor = Supervisor::new(&name, console.clone());
    let machine = Machine::boot(&config, &console, supervisor.event_sink())?;
    let server = ApiServer::start(socket, supervisor.handle(), console).context("API server")?;
    drop(held);
    machine.start();
    supervisor.adopt(machine, &server);
    give_back_text();
    supervise(supervisor, server)
}

pub(super) fn receive(args: ReceiveArgs) -> anyhow::Result<Exit> {
    start_log(args.common.log.as_deref())?;
    keep_memory_private()?;
    let listen = args.listen.resolve()?;
    let arrival = args.backends.arrival(args.max_memory, args.reserve)?;
    if let Some(reserve) = args.reserve {
        memory::check_size(reserve).map_err(ConfigError::from)?;
    }
    let name = checked_name(&args.common)?;
    let held = Held::hold();
    let socket = bind(&args.common, &name)?;
    let console = Console::to_stdout().context("console")?;
    let mut supervisor = Supervisor::new(&name, console.clone());
    let destination = MigrationDestination::new(arrival, console.clone(), supervisor.event_sink())?;
    let receiver = Receiver::listen(&listen, ReceiveOptions::default())?;
    let server = ApiServer::start(socket, supervisor.handle(), console).context("API server")?;
    drop(held);
    // Scripts wait for this line.
    output::tell(&format!("{name} is listening on {}", receiver.endpoint()));
    supervisor.receive(receiver, destination).context("receive job")?;
    supervise(supervisor, server)
}

pub(super) fn restore(args: RestoreArgs) -> anyhow::Result<Exit> {
    start_log(args.common.log.as_deref())?;
    keep_memory_private()?;
    let arrival = args.backends.arrival(None, None)?;
    let name = checked_name(&args.common)?;
    let console = Console::to_stdout().context("console")?;
    let mut supervisor = Supervisor::new(&name, console.clone());
    let destination = MigrationDestination::new(arrival, console.clone(), supervisor.event_sink())?;
    let snapshot = Snapshot::open(&args.directory)?;
    destination.check_all(snapshot.machine())?;
    // May take long, and leaves nothing behind: a signal may end it where it stands.
    let memory = snapshot_memory(&snapshot, args.preload, args.uffd.as_deref(), supervisor.handle())?;
    let held = Held::hold();
    let socket = bind(&args.common, &name)?;
    let server = ApiServer::start(socket, supervisor.handle(), console).context("API server")?;
    drop(held);
    let age = snapshot.age();
    if age.is_zero() {
        tracing::warn!(
            "the snapshot is from the future of this host's clock: the guest's clocks go on where they stood"
        );
    }
    let after = if args.resume {
        "runs".into()
    } else {
        format!("is paused; `godwit resume {name}` lets it go on")
    };
    let announcement = format!(
        "{name} is restored and {after}; its clocks go on by {}",
        duration(age.as_secs_f64() * 1e3)
    );
    let restore = move || destination.restore_snapshot(&snapshot, memory, args.resume);
    supervisor
        .restore(restore, args.uffd.is_some(), announcement)
        .context("restore job")?;
    supervise(supervisor, server)
}

fn snapshot_memory(
    snapshot: &Snapshot,
    preload: bool,
    uffd: Option<&Path>,
    supervisor: SupervisorHandle,
) -> anyhow::Result<SnapshotMemory> {
    if let Some(socket) = uffd {
        let memory = snapshot.without_pages()?;
        let on_gone = move || supervisor.send(Event::FaultHandlerGone);
        let handler = FaultHandler::connect(socket, &memory, on_gone)?;
        return Ok(SnapshotMemory::Handled(memory, handler));
    }
    // Other processes could not share what is mapped from a file for this one alone.
    let kind = snapshot.machine().memory_kind;
    if !preload && kind != MemoryKind::Shared {
        return Ok(SnapshotMemory::Mapped(snapshot.map()?));
    }
    Ok(SnapshotMemory::Read(with_bar(|watch| {
        snapshot.read(kind, watch)
    })?))
}

fn supervise(supervisor: Supervisor, server: ApiServer) -> anyhow::Result<Exit> {
    outlive_file_size_limit();
    let terminal = RawTerminal::enter().context("terminal")?;
    forward_stdin(&server, supervisor.handle(), terminal.is_some())?;
    let ending = supervisor.run(server);
    drop(terminal);
    match ending? {
        Ending::Guest(reason) => tracing::info!("the guest ended: {reason:?}"),
        Ending::Stopped => tracing::info!("stopped"),
        Ending::Saved => tracing::info!("saved: the guest is in the snapshot"),
        Ending::Moved => tracing::info!("moved: the guest runs at the destination"),
    }
    Ok(Exit::Done)
}

fn wishes(args: &RunArgs) -> Wishes {
    Wishes {
        kernel: args.kernel.clone(),
        initrd: args.initrd.clone(),
        cmdline: args.cmdline.clone(),
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

fn checked_name(common: &CommonArgs) -> anyhow::Result<String> {
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

/// Passes standard input on to the guest. In a terminal the escape key goes to the supervisor instead.
fn forward_stdin(server: &ApiServer, supervisor: SupervisorHandle, escape: bool) -> anyhow::Result<()> {
    let input = server.console_input().clone();
    // Ends with the process: a read from a terminal cannot be interrupted otherwise.
    std::thread::Builder::new()
        .name("stdin".into())
        .spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = io::stdin().lock().read(&mut chunk) {
                let mut bytes = &chunk[..count];
                if escape && bytes.contains(&ESCAPE) {
                    supervisor.send(Event::Escape);
                    continue;
                }
                while !bytes.is_empty() {
                    bytes = &bytes[input.offer(bytes)..];
                    if !bytes.is_empty() {
                        std::thread::sleep(ConsoleInput::RETRY);
                    }
                }
            }
        })
        .context("stdin thread")?;
    Ok(())
}
