//! `snapshot`: puts a VM in files. `snapshot merge`: puts such files together.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use api::client::{Client, ClientError};
use api::rundir;
use api::{InstanceInfo, SnapshotProgress, SnapshotReport, SnapshotRequest};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use output::print;
use threads::Role;
use tokio::sync::oneshot;
use vmm::snapshot::{self, Snapshot, SnapshotDifference, SnapshotError, SnapshotWatch};

use super::client::{STOP_TIMEOUT, block_on, ended, json_line};
use crate::Exit;
use crate::args::{MergeArgs, SnapshotArgs, SnapshotCommand, WriteArgs};
use crate::report::figures::{bytes, duration};

/// How long the VM may give no sign of life.
const SILENCE: Duration = Duration::from_secs(30);

pub(super) fn run(args: SnapshotArgs) -> anyhow::Result<Exit> {
    match (args.command, args.write) {
        (Some(SnapshotCommand::Merge(args)), _) => merge(&args),
        (None, Some(args)) => write(&args),
        (None, None) => bail!("expected a VM, or `merge`, got neither"),
    }
}

fn write(args: &WriteArgs) -> anyhow::Result<Exit> {
    let socket = rundir::resolve(&args.vm)?;
    let client = Client::new(&socket).patient(SILENCE);
    // The answer comes when all is written. That its process lives shows meanwhile.
    let writer = Client::new(&socket).patient(Duration::MAX);
    // The VM may have another working directory.
    let path = std::path::absolute(&args.directory).context("snapshot directory")?;
    let request = SnapshotRequest {
        path,
        keep_running: args.keep_running,
        diff: args.diff,
        live: args.live,
    };
    let bar = MemoryBar::new();
    let report = block_on(async {
        let report: SnapshotReport = tokio::select! {
            report = writer.put("/snapshot", &request) => report,
            silent = watch(&client, &bar) => Err(silent),
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
    print(&if args.json {
        json_line(&report)?
    } else {
        format!("{}\n", summary(args, &report))
    });
    Ok(Exit::Done)
}

fn merge(args: &MergeArgs) -> anyhow::Result<Exit> {
    let base = Snapshot::open(&args.base)?;
    let differences: Vec<_> = args
        .differences
        .iter()
        .map(|directory| SnapshotDifference::open(directory))
        .collect::<Result<_, _>>()?;
    let manifest = with_bar(|watch| snapshot::merge(&base, &differences, &args.output, watch))?;
    let (path, stored) = (shown(&args.output), bytes(manifest.stored_bytes() as f64));
    print(&format!(
        "{path} is whole, with {stored} stored; go on with `godwit restore {path} --resume`\n"
    ));
    Ok(Exit::Done)
}

fn summary(args: &WriteArgs, report: &SnapshotReport) -> String {
    let (vm, path) = (&args.vm, shown(&report.path));
    let after = match (args.keep_running, args.diff) {
        (true, _) => "it stays here".into(),
        (false, false) => format!("go on with `godwit restore {path} --resume`"),
        (false, true) => {
            format!("put it on top of what it is to by `godwit snapshot merge BASE [DIFF]... {path} -o DIR`")
        }
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

/// Shows how far it is, and cancels at Ctrl-C, for as long as the VM answers. Returns that it does not.
async fn watch(client: &Client, bar: &MemoryBar) -> ClientError {
    loop {
        tokio::select! {
            () = tokio::time::sleep(MemoryBar::INTERVAL) => {}
            _ = tokio::signal::ctrl_c() => {
                // Where that comes too late, the answer that is waited for says so.
                let _ = client.delete("/snapshot").await;
            }
        }
        let asked: Result<InstanceInfo, _> = client.get("/").await;
        match asked {
            Ok(info) => info.snapshot.iter().for_each(|progress| bar.show(progress)),
            Err(silent @ ClientError::NoAnswer { .. }) => return silent,
            // It ends: the answer that counts has come, or comes to nothing by itself.
            Err(_) => {}
        }
    }
}

/// Does `work` on a snapshot's files, shows how far it is, and cancels it at Ctrl-C: nothing is left half-done.
pub(super) fn with_bar<T>(
    work: impl FnOnce(&SnapshotWatch) -> Result<T, SnapshotError>,
) -> Result<T, SnapshotError> {
    let (watch, bar) = (SnapshotWatch::default(), MemoryBar::new());
    let (done, waiting) = oneshot::channel::<()>();
    let ended = std::thread::scope(|scope| {
        let (watch, bar) = (&watch, &bar);
        // Without it nothing is shown, and the work goes on.
        let _ = threads::spawn_scoped(scope, Role::Helper, "progress", move || {
            block_on(accompany(watch, bar, waiting))
        });
        let ended = work(watch);
        drop(done);
        ended
    });
    bar.clear();
    ended
}

/// Until the other end of `done` is dropped.
async fn accompany(watch: &SnapshotWatch, bar: &MemoryBar, mut done: oneshot::Receiver<()>) {
    loop {
        tokio::select! {
            _ = &mut done => return,
            _ = tokio::signal::ctrl_c() => watch.cancel(),
            () = tokio::time::sleep(MemoryBar::INTERVAL) => bar.show(&watch.progress()),
        }
    }
}

/// How much of a guest's memory is written or read; nothing where standard error is no terminal.
struct MemoryBar(ProgressBar);

impl MemoryBar {
    /// How often it is worth drawing anew.
    const INTERVAL: Duration = Duration::from_millis(100);

    fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) =
            ProgressStyle::with_template("[{bar:16}] {percent:>3}% {bytes} of {total_bytes}, {eta} left")
        {
            bar.set_style(style.progress_chars("=> "));
        }
        Self(bar)
    }

    fn show(&self, progress: &SnapshotProgress) {
        self.0.set_length(progress.total_bytes);
        self.0.set_position(progress.done_bytes);
    }

    fn clear(&self) {
        self.0.finish_and_clear();
    }
}
