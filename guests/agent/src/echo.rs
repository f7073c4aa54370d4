//! An echo service on vsock: what a program on the host sends comes back. That program checks it.

use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;
use std::thread;

use rustix::io::Errno;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

use crate::report::AgentReport;

/// Where it listens.
const PORT: u32 = 1024;
/// Bytes that are read at a time.
const CHUNK: usize = 16 << 10;

/// Starts it where the kernel has vsock.
pub(crate) fn start(report: &Arc<AgentReport>) {
    let listener = match VsockListener::bind_with_cid_port(VMADDR_CID_ANY, PORT) {
        Ok(listener) => listener,
        Err(error) if error.raw_os_error() == Some(Errno::AFNOSUPPORT.raw_os_error()) => return,
        Err(error) => return report.error(format_args!("vsock={PORT} expected=listening got={error}")),
    };
    report.line(format_args!("vsock port={PORT}"));
    let report = report.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => serve(stream, &report),
                Err(error) => {
                    return report.error(format_args!("vsock={PORT} expected=accepted got={error}"));
                }
            }
        }
    });
}

/// Connects to a port of the host and serves there as well.
pub(crate) fn dial(port: &str, report: &Arc<AgentReport>) {
    let Ok(port) = port.parse() else {
        return report.error(format_args!("dial={port} expected=a port got=nonsense"));
    };
    let report = report.clone();
    thread::spawn(
        move || match VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port) {
            Ok(stream) => serve(stream, &report),
            Err(error) => report.line(format_args!("dial port={port} end={}", word(&error))),
        },
    );
}

fn serve(mut stream: VsockStream, report: &Arc<AgentReport>) {
    let report = report.clone();
    thread::spawn(move || {
        let mut bytes = 0;
        let end = loop {
            match echo(&mut stream) {
                Ok(0) => break "eof".to_owned(),
                Ok(count) => bytes += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break word(&error),
            }
        };
        report.line(format_args!("echo bytes={bytes} end={end}"));
    });
}

/// What went wrong, without spaces: `connection-reset`.
fn word(error: &std::io::Error) -> String {
    error.kind().to_string().replace(' ', "-")
}

/// Sends back what comes next; 0 at the end.
fn echo(stream: &mut VsockStream) -> std::io::Result<usize> {
    let mut chunk = [0; CHUNK];
    let count = stream.read(&mut chunk)?;
    stream.write_all(&chunk[..count])?;
    Ok(count)
}
