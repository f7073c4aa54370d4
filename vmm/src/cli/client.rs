//! The commands that talk to a running VM over its API socket.

use std::future::Future;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use hyper::Method;
use migration::Decision;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};

use super::args::{DiskArgs, ListArgs, OutputArgs, ResolveArgs, StopArgs, VmArgs};
use super::terminal::{ESCAPE, RawTerminal};
use super::{Exit, progress};
use crate::api::client::Client;
use crate::api::{Action, ActionType, InstanceInfo, Resolution, ResolveRequest, Verdict, VmState, VmUpdate};
use crate::console::terminal_size;
use crate::output::{print, tell};
use crate::report::figures::bytes;
use crate::rundir;
use crate::snapshot::SnapshotProgress;
use crate::supervisor::POWER_OFF_GRACE;

/// How often `stop` looks whether the VM has ended.
const STOP_POLL: Duration = Duration::from_millis(50);
/// How long a VM's process may take to end once it was told to.
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
    if let Some(SnapshotProgress {
        done_bytes,
        total_bytes,
    }) = &info.snapshot
    {
        let (done, total) = (bytes(*done_bytes as f64), bytes(*total_bytes as f64));
        text += &format!("  snapshot   {done} of {total} of memory\n");
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
    let client = connect(vm)?;
    block_on(client.send_json(Method::PATCH, "/vm", &VmUpdate { state }))??;
    Ok(Exit::Done)
}

/// Limits are left as they are.
pub(super) fn disk(args: &DiskArgs) -> anyhow::Result<Exit> {
    let client = connect(&args.vm)?;
    let update = serde_json::json!({ "drive_id": args.id });
    block_on(client.send_json(Method::PATCH, &format!("/drives/{}", args.id), &update))??;
    Ok(Exit::Done)
}

pub(super) fn cancel(args: &VmArgs) -> anyhow::Result<Exit> {
    let client = connect(&args.vm)?;
    block_on(client.delete("/migration"))??;
    Ok(Exit::Done)
}

pub(super) fn resolve(args: &ResolveArgs) -> anyhow::Result<Exit> {
    let client = connect(&args.vm)?;
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
        Verdict::InDoubt => Exit::InDoubt,
        _ if resolution.as_asked => Exit::Done,
        _ => Exit::Failed,
    })
}

pub(super) fn stop(args: &StopArgs) -> anyhow::Result<Exit> {
    let path = rundir::resolve(&args.vm)?;
    let client = Client::new(&path);
    block_on(async {
        let info: InstanceInfo = client.get("/").await?;
        let runs = info.state == crate::api::InstanceState::Running;
        if !args.force && runs {
            act(&client, ActionType::SendCtrlAltDel).await?;
            if ended(&path, POWER_OFF_GRACE).await {
                return Ok(Exit::Done);
            }
            tell(&format!(
                "the guest did not shut down within {POWER_OFF_GRACE:?}: stopping it"
            ));
        }
        act(&client, ActionType::Stop).await?;
        if !ended(&path, STOP_TIMEOUT).await {
            bail!(
                "{}: still there after {STOP_TIMEOUT:?} (process {})",
                args.vm,
                info.pid
            );
        }
        Ok(Exit::Done)
    })?
}

async fn act(client: &Client, action_type: ActionType) -> anyhow::Result<()> {
    Ok(client
        .send_json(Method::PUT, "/actions", &Action { action_type })
        .await?)
}

/// Whether nobody answers at the socket any more, within `timeout`.
pub(super) async fn ended(path: &Path, timeout: Duration) -> bool {
    let gone = async {
        while tokio::net::UnixStream::connect(path).await.is_ok() {
            tokio::time::sleep(STOP_POLL).await;
        }
    };
    tokio::time::timeout(timeout, gone).await.is_ok()
}

pub(super) fn ps(args: &ListArgs) -> anyhow::Result<Exit> {
    let vms = rundir::list()?;
    let infos: Vec<InstanceInfo> = block_on(async {
        let mut infos = Vec::new();
        for (name, path) in &vms {
            match Client::new(path).get("/").await {
                Ok(info) => infos.push(info),
                // It may have ended just now.
                Err(error) => tell(&format!("{name}: {}", migration::chain(&error))),
            }
        }
        infos
    })?;
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

pub(super) fn console(args: &VmArgs) -> anyhow::Result<Exit> {
    let client = connect(&args.vm)?;
    block_on(async {
        let stream = client.console().await?;
        if io::stdin().is_terminal() {
            tell(&format!("attached to {}; Ctrl-] detaches", args.vm));
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
        if let Some(size) = terminal_size() {
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
                // Whoever went away has seen enough.
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
