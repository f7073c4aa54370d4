//! iperf3 on the loopback: what the kernel carries between two processes that do nothing else.

use std::net::TcpListener;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::{Finished, PATIENCE, TestProcess};

/// Seconds of one measurement.
const SECONDS: &str = "1";

/// Bytes per second that so many pairs of processes carry at the same time, in sum. Debian's version runs all
/// streams of one process on one thread, so more streams are more processes.
pub(crate) fn rate(pairs: u32, zero_copy: bool) -> Result<f64> {
    let servers = (0..pairs)
        .map(|_| IperfServer::start())
        .collect::<Result<Vec<_>>>()?;
    let clients = servers.iter().map(|server| client(server.port, zero_copy));
    let clients = clients.collect::<Result<Vec<_>>>()?;
    clients
        .into_iter()
        .map(|client| received(client.finish(PATIENCE)?))
        .sum()
}

struct IperfServer {
    port: u16,
    /// Ends after one client, or when this is dropped.
    _process: TestProcess,
}

impl IperfServer {
    fn start() -> Result<Self> {
        // Binding port 0 finds a free port; it stays free for the moment that the server needs.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = Command::new("iperf3");
        command.args([
            "--server",
            "--one-off",
            "--forceflush",
            "--bind",
            "127.0.0.1",
            "--port",
            &port.to_string(),
        ]);
        let process = TestProcess::spawn(command)?;
        let listens = |line: &str| line.starts_with("Server listening").then_some(());
        process.stdout().wait("iperf3's server", 0, PATIENCE, listens)?;
        Ok(Self {
            port,
            _process: process,
        })
    }
}

fn client(port: u16, zero_copy: bool) -> Result<TestProcess> {
    let mut command = Command::new("iperf3");
    command.args([
        "--client",
        "127.0.0.1",
        "--port",
        &port.to_string(),
        "--time",
        SECONDS,
        "--json",
    ]);
    if zero_copy {
        command.arg("--zerocopy");
    }
    TestProcess::spawn(command)
}

fn received(finished: Finished) -> Result<f64> {
    ensure!(
        finished.code == Some(0),
        "iperf3: {}{}",
        finished.stdout,
        finished.stderr
    );
    let report: Value = serde_json::from_str(&finished.stdout).context("iperf3's report")?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.context("iperf3's report has no sum_received")? / 8.0)
}
