//! `snapshot`: puts a VM in files.

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Exit;
use super::args::SnapshotArgs;
use super::client::{STOP_TIMEOUT, block_on, ended};
use crate::api::client::Client;
use crate::api::{InstanceInfo, SnapshotReport, SnapshotRequest};
use crate::report::figures::{bytes, duration};
use crate::rundir;
use crate::snapshot::SnapshotProgress;

pub(super) fn run(args: &SnapshotArgs) -> anyhow::Result<Exit> {
    let socket = rundir::resolve(&args.vm)?;
    let client = Client::new(&socket);
    // The VM may have another working directory.
    let path = std::path::absolute(&args.directory).context("snapshot directory")?;
    let request = SnapshotRequest {
        path,
        keep_running: args.keep_running,
    };
    let bar = MemoryBar::new();
    let report = block_on(async {
        let report: SnapshotReport = tokio::select! {
            report = client.put("/snapshot", &request) => report,
            never = watch(&client, &bar) => match never {},
        }
        .inspect_err(|_| bar.clear())?;
        bar.clear();
        // Only then its name and its disks are free.
        if !args.keep_running && !ended(&socket, STOP_TIMEOUT).await {
            bail!(
                "{}: the snapshot is complete, but the VM is still there after {STOP_TIMEOUT:?}",
                args.vm
            );
        }
        Ok(report)
    })??;
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
        return Ok(Exit::Done);
    }
    writeln!(out, "{}", told(&args.vm, &report, args.keep_running))?;
    Ok(Exit::Done)
}

fn told(vm: &str, report: &SnapshotReport, keep_running: bool) -> String {
    let path = shown(&report.path);
    let after = if keep_running {
        "it runs on".into()
    } else {
        format!("go on with `godwit restore {path} --resume`")
    };
    format!(
        "{vm} is in {path}: {} of {} stored in {}, the guest stood still for {}; {after}",
        bytes(report.stored_bytes as f64),
        bytes(report.memory_bytes as f64),
        duration(report.total_ms),
        duration(report.paused_ms),
    )
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Shows how far it is, and cancels at Ctrl-C, for as long as somebody waits for it.
async fn watch(client: &Client, bar: &MemoryBar) -> std::convert::Infallible {
    loop {
        tokio::select! {
            () = tokio::time::sleep(MemoryBar::INTERVAL) => {}
            _ = tokio::signal::ctrl_c() => {
                // Where that comes too late, the answer that is waited for says so.
                let _ = client.delete("/snapshot").await;
            }
        }
        // A VM that does not answer has something better to do: the answer that counts comes anyway.
        if let Ok(InstanceInfo {
            snapshot: Some(progress),
            ..
        }) = client.get("/").await
        {
            bar.show(&progress);
        }
    }
}

/// How much of a guest's memory is written or read; nothing where standard error is no terminal.
pub(super) struct MemoryBar(ProgressBar);

impl MemoryBar {
    /// How often it is worth drawing anew.
    pub(super) const INTERVAL: Duration = Duration::from_millis(100);

    pub(super) fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) =
            ProgressStyle::with_template("[{bar:16}] {percent:>3}% {bytes} of {total_bytes}, {eta} left")
        {
            bar.set_style(style.progress_chars("=> "));
        }
        Self(bar)
    }

    pub(super) fn show(&self, progress: &SnapshotProgress) {
        self.0.set_length(progress.total_bytes);
        self.0.set_position(progress.done_bytes);
    }

    pub(super) fn clear(&self) {
        self.0.finish_and_clear();
    }
}
