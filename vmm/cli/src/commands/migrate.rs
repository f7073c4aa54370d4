//! `migrate`: asks the VM to move, shows how far it is, prints the report.

use std::fmt::{self, Write};
use std::time::Duration;

use api::client::{Client, ClientError};
use api::{MigrationEvent, MigrationRequest};
use migration::{Compression, OnMiss, Outcome, Report};
use output::{print, print_line};

use super::client::{block_on, connect, json_line};
use super::progress::Bar;
use crate::Exit;
use crate::args::{CompressionArg, MigrateArgs, OnMissArg};
use crate::report::TraceWriter;
use crate::report::figures::predicted;

/// How long the VM may take to begin: it may be busy with what was asked for before.
const START: Duration = Duration::from_secs(30);

pub(super) fn run(args: MigrateArgs) -> anyhow::Result<Exit> {
    let client = connect(&args.vm)?.patient(START);
    let request = request(&args)?;
    // Before anything else, so that a trace that cannot be written is an error before the migration.
    let trace = args
        .trace
        .as_deref()
        .map(|path| TraceWriter::create(path, &args.vm, &request.destination, &request))
        .transpose()?;
    let Some(report) = block_on(follow(&client, &request, trace))?? else {
        print_line(
            "no report from the VM's process; ask the destination (`godwit status` there) and read the VM's log",
        );
        return Ok(Exit::InDoubt);
    };
    print(&if args.json {
        json_line(&report)?
    } else {
        report_text(&report)
    });
    if let Some(error) = &report.error {
        print_line(&format!(
            "migration to {}: {}: {error}",
            args.destination,
            outcome(report.outcome)
        ));
    }
    if report.outcome == Outcome::InDoubt {
        print_line(&format!("`godwit resolve {}` asks the destination", args.vm));
    }
    Ok(match report.outcome {
        Outcome::Moved => Exit::Done,
        Outcome::Failed | Outcome::Cancelled => Exit::Failed,
        Outcome::InDoubt => Exit::InDoubt,
    })
}

fn request(args: &MigrateArgs) -> anyhow::Result<MigrationRequest> {
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    Ok(MigrationRequest {
        max_downtime_ms: ms(args.max_downtime),
        deadline_ms: args.deadline.map(ms),
        on_miss: match args.on_miss {
            OnMissArg::Fail => OnMiss::Fail,
            OnMissArg::Switch => OnMiss::Switch,
        },
        streams: args.streams,
        bandwidth_bytes_per_s: args.bandwidth,
        final_bandwidth_bytes_per_s: args.final_bandwidth,
        throttle: !args.no_throttle,
        compression: args.compression.map(|compression| match compression {
            CompressionArg::Lz4 => Compression::Lz4,
            CompressionArg::Zstd => Compression::Zstd,
        }),
        verify: args.verify,
        with_disks: args.with_disks,
        ..MigrationRequest::to(&args.destination.resolve()?)
    })
}

/// Until the report comes. Ctrl-C cancels the migration and goes on waiting for its report.
async fn follow(
    client: &Client,
    request: &MigrationRequest,
    mut trace: Option<TraceWriter>,
) -> anyhow::Result<Option<Report>> {
    let bar = Bar::new();
    let mut report = None;
    let mut started = false;
    let events = client.stream("/migration", request, |event| {
        started = true;
        let written = match (&event, &mut trace) {
            (MigrationEvent::Samples(samples), Some(trace)) => trace.samples(samples),
            (MigrationEvent::Report(report), Some(trace)) => trace.report(report),
            _ => Ok(()),
        };
        if let Err(error) = written {
            // The move counts, not its trace.
            trace = None;
            bar.suspend(|| print_line(&format!("the trace ends here: {}", migration::chain(&error))));
        }
        match event {
            MigrationEvent::Progress(progress) => bar.show(&progress),
            MigrationEvent::Samples(_) => {}
            MigrationEvent::Report(last) => report = Some(*last),
        }
    });
    let cancel = async {
        loop {
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending::<()>().await;
            }
            if let Err(error) = client.delete("/migration").await {
                bar.suspend(|| print_line(&format!("cannot cancel: {}", migration::chain(&error))));
            }
        }
    };
    let result = tokio::select! {
        result = events => result,
        () = cancel => Ok(()),
    };
    bar.clear();
    match result {
        Ok(()) => Ok(report),
        // The stream broke off: the report is what counts, if it had come.
        Err(ClientError::Http { .. }) if started => Ok(report),
        Err(silent @ ClientError::NoAnswer { .. }) if started => {
            print_line(&migration::chain(&silent));
            Ok(report)
        }
        Err(error) => Err(error.into()),
    }
}

fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Moved => "done",
        Outcome::Failed => "failed, the guest was not moved",
        Outcome::Cancelled => "cancelled, the guest was not moved",
        Outcome::InDoubt => "in doubt, the guest stays paused here",
    }
}

fn report_text(report: &Report) -> String {
    let mut text = String::new();
    // A string takes everything.
    let _ = write_report(&mut text, report);
    text
}

fn write_report(out: &mut impl Write, report: &Report) -> fmt::Result {
    const MIB: f64 = (1 << 20) as f64;
    let ms = |value: Option<f64>| value.map_or("unknown".into(), |ms| format!("{ms:.2} ms"));
    writeln!(out, "migration {}", outcome(report.outcome))?;
    writeln!(
        out,
        "  total      {:.1} ms in {} rounds",
        report.total_ms,
        report.rounds.len()
    )?;
    writeln!(
        out,
        "  sent       {:.1} MiB: {} pages and {} zero pages",
        report.bytes_sent as f64 / MIB,
        report.pages_sent,
        report.pages_zero
    )?;
    if report.pages_unused > 0 {
        writeln!(
            out,
            "  left out   {:.1} MiB that the guest does not use",
            (report.pages_unused * migration::PAGE_SIZE) as f64 / MIB
        )?;
    }
    if report.disks > 0 {
        writeln!(
            out,
            "  disks      {} came along: {:.1} MiB, in {:.1} ms before memory",
            report.disks,
            report.disk_bytes as f64 / MIB,
            report.mirror_ms
        )?;
    }
    if report.outcome == Outcome::Moved {
        let kept = if report.budget_kept { "kept" } else { "missed" };
        writeln!(
            out,
            "  downtime   {} (predicted {}), budget of {} ms {kept}",
            ms(report.downtime_ms),
            predicted(
                report.predicted_downtime_ms,
                report.predicted_downtime_interval_ms
            ),
            report.budget_ms
        )?;
        let terms = &report.downtime;
        writeln!(
            out,
            "             pause {:.2}, drain {:.2}, last log {:.2}, last copy {:.2}, state {:.2}, restore {:.2}, commit {:.2}, resume {:.2}",
            terms.pause_ms,
            terms.drain_ms,
            terms.final_log_ms,
            terms.final_copy_ms,
            terms.state_ms,
            terms.restore_ms,
            terms.commit_ms,
            terms.resume_ms
        )?;
    }
    if let Some(digest) = &report.memory_digest {
        let equal = if digest.source == digest.destination {
            "equal"
        } else {
            "DIFFERENT"
        };
        writeln!(
            out,
            "  memory     {equal} on both sides, digest {}",
            digest.source
        )?;
    }
    Ok(())
}
