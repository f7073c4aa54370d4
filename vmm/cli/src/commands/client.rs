//! The commands that talk to a running VM over its API socket.

use std::future::Future;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use api::SnapshotProgress;
use api::client::{ANSWER, Client, ClientError};
use api::rundir;
use api::{
    Action, ActionType, ConsoleSize, DriveUpdate, InstanceInfo, InstanceState, Resolution, ResolveRequest,
    Resolved, VmState, VmUpdate,
};
use devices::virtio::console::TerminalSize;
use hyper::Method;
use migration::Decision;
use output::{print, print_line};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use vmm::console::terminal_size;

use super::owner::{self, Owner};
use super::progress;
use crate::Exit;
use crate::args::{DiskArgs, ListArgs, OutputArgs, ResolveArgs, StopArgs, VmArgs};
use crate::process::terminal::{ESCAPE, RawTerminal};
use crate::report::figures::bytes;

/// A VM that is silent for this long is listed as such, and ended by `stop --force`.
const SILENCE: Duration = Duration::from_secs(3);
/// How long `pause`, `resume` and `disk` may take: each waits up to 10 s for a vCPU or an image, and for one before it.
const OPERATION: Duration = Duration::from_secs(30);
/// How long `resolve` may take: the other end has 10 s to answer, and the guest 10 s to go on.
const RESOLVE: Duration = Duration::from_secs(40);
/// How often `stop` looks whether the VM has ended.
const STOP_POLL: Duration = Duration::from_millis(50);
/// How long a VM's process may take to end once it was asked to.
pub(super) const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// A client of the VM with that name or socket.
pub(super) fn connect(vm: &str) -> anyhow::Result<Client> {
    Ok(Client::new(&rundir::resolve(vm)?))
}

/// Runs a client's future on this thread.
pub(super) fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("runtime")?;
    let result = runtime.block_on(future);
    // A read from a terminal may still be under way on a helper thread.
    runtime.shutdown_background();
    Ok(result)
}

pub(super) fn status(args: &OutputArgs) -> anyhow::Result<Exit> {
    let client = connect(&args.vm)?;
    let info: InstanceInfo = block_on(client.get("/"))??;
    print(&if args.json {
        json_line(&info)?
    } else {
        status_text(&info)
    });
    Ok(Exit::Done)
}

fn status_text(info: &InstanceInfo) -> String {
    let mut text = format!(
        "{}: {}\n  process    {} (godwit {})\n",
        info.id, info.state, info.pid, info.vmm_version
    );
    if info.vcpu_count > 0 {
        text += &format!(
            "  machine    {} vCPUs, {} MiB, CPU template {}\n",
            info.vcpu_count, info.mem_size_mib, info.cpu_template
        );
    }
    if let Some(in_doubt) = &info.in_doubt {
        text += &format!("  in doubt   {in_doubt}\n");
    }
    for (what, progress) in [("snapshot", &info.snapshot), ("prefetch", &info.prefetch)] {
        let Some(SnapshotProgress {
            done_bytes,
            total_bytes,
        }) = progress
        else {
            continue;
        };
        let (done, total) = (bytes(*done_bytes as f64), bytes(*total_bytes as f64));
        text += &format!("  {what}   {done} of {total} of memory\n");
    }
    for line in info.migration.iter().flat_map(progress::lines) {
        text += &format!("  {line}\n");
    }
    text
}

/// One line of JSON for standard output.
pub(super) fn json_line(value: &impl Serialize) -> serde_json::Result<String> {
    Ok(serde_json::to_string(value)? + "\n")
}

pub(super) fn pause(args: &VmArgs) -> anyhow::Result<Exit> {
    update(&args.vm, VmState::Paused)
}

pub(super) fn resume(args: &VmArgs) -> anyhow::Result<Exit> {
    update(&args.vm, VmState::Resumed)
}

fn update(vm: &str, state: VmState) -> anyhow::Result<Exit> {
    let client = connect(vm)?.patient(OPERATION);
    block_on(client.send_json(Method::PATCH, "/vm", &VmUpdate { state }))??;
    Ok(Exit::Done)
}

/// Limits are left as they are.
pub(super) fn disk(args: &DiskArgs) -> anyhow::Result<Exit> {
    let client = connect(&args.vm)?.patient(OPERATION);
    let update = DriveUpdate {
        drive_id: args.id.clone(),
        path_on_host: None,
        rate_limiter: None,
    };
    block_on(client.send_json(Method::PATCH, &format!("/drives/{}", args.id), &update))??;
    Ok(Exit::Done)
}

pub(super) fn cancel(args: &VmArgs) -> anyhow::Result<Exit> {
    let client = connect(&args.vm)?;
    block_on(client.delete("/migration"))??;
    Ok(Exit::Done)
}

pub(super) fn resolve(args: &ResolveArgs) -> anyhow::Result<Exit> {
    let client = connect(&args.vm)?.patient(RESOLVE);
    let decision = match (args.run, args.discard) {
        (true, _) => Some(Decision::Run),
        (_, true) => Some(Decision::Discard),
        _ => None,
    };
    let request = ResolveRequest { decision };
    let resolution: Resolution = block_on(client.put("/migration/resolve", &request))??;
    print(&if args.json {
        json_line(&resolution)?
    } else {
        format!("{}: {}\n", args.vm, resolution.message)
    });
    Ok(match resolution.verdict {
        Resolved::InDoubt => Exit::InDoubt,
        _ if resolution.as_asked => Exit::Done,
        _ => Exit::Failed,
    })
}

pub(super) fn stop(args: &StopArgs) -> anyhow::Result<Exit> {
    let path = rundir::resolve(&args.vm)?;
    match block_on(request_stop(args, &path))? {
        Err(error) if args.force && is_silence(&error) => {
            let owner = Owner::of(&path)?;
            let pid = owner.pid;
            print_line(&format!("{} does not answer: ending its process, {pid}", args.vm));
            if !owner.kill(STOP_TIMEOUT)? {
                bail!(
                    "{}: process {pid} is still there {STOP_TIMEOUT:?} after SIGKILL: the kernel does not let it go",
                    args.vm
                );
            }
            Ok(Exit::Done)
        }
        Err(error) if is_silence(&error) => Err(error.context("`godwit stop --force` ends its process")),
        other => other,
    }
}

async fn request_stop(args: &StopArgs, path: &Path) -> anyhow::Result<Exit> {
    let patience = if args.force { SILENCE } else { ANSWER };
    let client = Client::new(path).patient(patience);
    let info: InstanceInfo = client.get("/").await?;
    match request_end(args, path, &client, info).await {
        // It was on its way already, and ended between two questions.
        Err(_) if is_abandoned(path).await => Ok(Exit::Done),
        ended => ended,
    }
}

async fn request_end(
    args: &StopArgs,
    path: &Path,
    client: &Client,
    info: InstanceInfo,
) -> anyhow::Result<Exit> {
    if info.state == InstanceState::InDoubt && !args.force {
        print_line(&format!(
            "{vm} is in doubt, and this may be the only copy of its guest: `godwit resolve {vm}` asks the other end; `godwit stop --force` throws this copy away",
            vm = args.vm
        ));
        return Ok(Exit::InDoubt);
    }
    if !args.force && info.state == InstanceState::Running {
        let grace = args
            .timeout
            .unwrap_or(Duration::from_millis(info.stop_timeout_ms));
        act(client, ActionType::SendCtrlAltDel, false).await?;
        if ended(path, grace).await {
            return Ok(Exit::Done);
        }
        print_line(&format!(
            "the guest did not shut down within {grace:?}: stopping it"
        ));
    }
    act(client, ActionType::Stop, args.force).await?;
    if ended(path, STOP_TIMEOUT).await {
        return Ok(Exit::Done);
    }
    // One that still answers has something to finish.
    let _: InstanceInfo = client.get("/").await?;
    bail!(
        "{}: still there after {STOP_TIMEOUT:?} (process {})",
        args.vm,
        info.pid
    );
}

/// Whether a VM gave no answer at all.
fn is_silence(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<ClientError>();
    matches!(error, Some(ClientError::NoAnswer { .. }))
}

async fn act(client: &Client, action_type: ActionType, force: bool) -> anyhow::Result<()> {
    let action = Action { action_type, force };
    Ok(client.send_json(Method::PUT, "/actions", &action).await?)
}

/// Waits up to `timeout`; returns whether no process listens on the socket any more.
pub(super) async fn ended(path: &Path, timeout: Duration) -> bool {
    let gone = async {
        while !is_abandoned(path).await {
            tokio::time::sleep(STOP_POLL).await;
        }
    };
    tokio::time::timeout(timeout, gone).await.is_ok()
}

async fn is_abandoned(path: &Path) -> bool {
    let connected = UnixStream::connect(path).await;
    connected.is_err_and(|error| has_no_listener(&error))
}

/// Whether that is why there is no connection. A process that takes none is still there.
fn has_no_listener(error: &io::Error) -> bool {
    [io::ErrorKind::ConnectionRefused, io::ErrorKind::NotFound].contains(&error.kind())
}

pub(super) fn ps(args: &ListArgs) -> anyhow::Result<Exit> {
    let vms = rundir::list()?;
    let infos = block_on(request_infos(vms))?;
    print(&if args.json {
        json_line(&infos)?
    } else {
        table(&infos)
    });
    Ok(Exit::Done)
}

fn table(infos: &[InstanceInfo]) -> String {
    let mut table = format!(
        "{:<24} {:<10} {:>8} {:>5} {:>10}\n",
        "NAME", "STATE", "PID", "VCPUS", "MEMORY"
    );
    for info in infos {
        let memory = format!("{} MiB", info.mem_size_mib);
        table += &format!(
            "{:<24} {:<10} {:>8} {:>5} {memory:>10}\n",
            info.id, info.state, info.pid, info.vcpu_count
        );
    }
    table
}

/// What each VM says of itself, in their order. All are asked at the same time, so that one that does not answer does
/// not delay the others; it is listed as such.
async fn request_infos(vms: Vec<(String, PathBuf)>) -> Vec<InstanceInfo> {
    let asked: Vec<_> = vms
        .into_iter()
        .map(|(name, path)| tokio::spawn(async move { request_info(&name, &path).await }))
        .collect();
    let mut infos = Vec::new();
    for answer in asked {
        // A task that panicked has been reported by the panic hook.
        infos.extend(answer.await.ok().flatten());
    }
    infos
}

/// `None` if it has ended.
async fn request_info(name: &str, path: &Path) -> Option<InstanceInfo> {
    let client = Client::new(path).patient(SILENCE);
    match client.get("/").await {
        Ok(info) => Some(info),
        Err(ClientError::Connect { source, .. }) if has_no_listener(&source) => None,
        // It may have ended just now.
        Err(_) if is_abandoned(path).await => None,
        Err(ClientError::NoAnswer { .. }) => {
            let pid = owner::listener(path).ok();
            let pid = pid.and_then(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok());
            Some(InstanceInfo::silent(name, pid))
        }
        Err(error) => {
            print_line(&format!("{name}: {}", migration::chain(&error)));
            None
        }
    }
}

pub(super) fn console(args: &VmArgs) -> anyhow::Result<Exit> {
    let client = connect(&args.vm)?;
    block_on(async {
        let stream = client.console().await?;
        if io::stdin().is_terminal() {
            print_line(&format!("attached to {}; Ctrl-] detaches", args.vm));
        }
        let _terminal = RawTerminal::enter().context("terminal")?;
        tokio::select! {
            ended = relay(stream) => ended?,
            failed = pass_size_on(&client) => return Err(failed),
        }
        Ok(Exit::Done)
    })?
}

/// Tells the guest of this terminal's size, and of every change. Returns why it cannot.
async fn pass_size_on(client: &Client) -> anyhow::Error {
    let mut resized = match signal(SignalKind::window_change()) {
        Ok(resized) => resized,
        Err(error) => return error.into(),
    };
    loop {
        if let Some(TerminalSize { columns, rows }) = terminal_size() {
            let size = ConsoleSize { columns, rows };
            // The end of the VM ends the console as well, which says so.
            let _ = client.send_json(Method::PUT, "/console/size", &size).await;
        }
        resized.recv().await;
    }
}

/// Until the VM ends, or the user types the escape key. The end of standard input leaves the output on.
async fn relay(stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite) -> io::Result<()> {
    let (mut from_guest, mut to_guest) = tokio::io::split(stream);
    let input = async {
        let mut stdin = tokio::io::stdin();
        let mut chunk = [0; 4096];
        loop {
            let count = stdin.read(&mut chunk).await?;
            if count == 0 {
                std::future::pending::<()>().await;
            }
            if chunk[..count].contains(&ESCAPE) {
                return Ok(());
            }
            to_guest.write_all(&chunk[..count]).await?;
        }
    };
    let output = async {
        let mut stdout = tokio::io::stdout();
        let mut chunk = [0; 4096];
        loop {
            let count = from_guest.read(&mut chunk).await?;
            if count == 0 {
                return Ok(());
            }
            match stdout.write_all(&chunk[..count]).await.and(stdout.flush().await) {
                // A reader that closed the pipe has read enough.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                written => written?,
            }
        }
    };
    tokio::select! {
        result = input => result,
        result = output => result,
    }
}
