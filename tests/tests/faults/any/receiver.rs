//! Destinations whose log has no reader.

use std::io::{BufRead, BufReader, PipeReader};

use anyhow::{Result, ensure};
use tests::{Elsewhere, Journey, OutputSink, Vm, wait_until};

use super::ANY_PORT;

/// Where a VM's standard error goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReceiverLog {
    /// To the test.
    Read,
    Into(OutputSink),
}

/// Half of them are read.
pub(super) const LOGS: [ReceiverLog; 6] = [
    ReceiverLog::Read,
    ReceiverLog::Read,
    ReceiverLog::Read,
    ReceiverLog::Into(OutputSink::Full),
    ReceiverLog::Into(OutputSink::Left),
    ReceiverLog::Into(OutputSink::Stuck),
];

/// A destination.
pub(super) struct FaultReceiver {
    pub(super) vm: Vm,
    /// Where the receiver itself listens, behind the proxy.
    pub(super) endpoint: String,
    /// The end of its log that is never read; once this is dropped, the end that is gone.
    _unread: Option<PipeReader>,
}

impl FaultReceiver {
    /// Starts one for the journey's next move. In later moves it is the source, with the same log.
    pub(super) fn start(journey: &Journey, options: &[String], log: ReceiverLog) -> Result<Self> {
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        let ReceiverLog::Into(sink) = log else {
            let (vm, endpoint) = journey.receiver_with(ANY_PORT, &options)?;
            return Ok(Self {
                vm,
                endpoint,
                _unread: None,
            });
        };
        // The port is chosen here: a receiver without a log cannot print one.
        let (host, name) = (&journey.host, journey.host.free_name());
        let path = host.path(&format!("{name}.move"));
        let endpoint = format!("unix:{}", path.display());
        // A socket that a killed VM has left would look like that of this receiver.
        let _ = std::fs::remove_file(&path);
        let mut command = host.command(["receive", "--name", &name, "--listen", &endpoint]);
        command.args(options);
        let (stderr, mut unread) = sink.open()?;
        let elsewhere = Elsewhere {
            stderr: Some(stderr),
            ..Default::default()
        };
        let vm = host.start_to(&name, command, elsewhere)?;
        if let (OutputSink::Left, Some(reader)) = (sink, &mut unread) {
            let mut line = String::new();
            BufReader::new(reader).read_line(&mut line)?;
            ensure!(line.ends_with('\n'), "expected a line from {name}, got {line:?}");
            unread = None;
        }
        wait_until("a receiver that listens", || {
            Ok(vm.godwit("status", &[])?.code == Some(0) && path.exists())
        })?;
        Ok(Self {
            vm,
            endpoint,
            _unread: unread,
        })
    }
}
