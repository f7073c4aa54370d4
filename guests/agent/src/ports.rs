//! An echo service on every named port of the virtio console: what a program on the host sends comes back.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{File, OpenOptions, read_dir, read_to_string};
use std::io::{self, Read, Write};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::report::AgentReport;

/// Where the kernel lists them; what is a console has no name there.
const CLASS: &str = "/sys/class/virtio-ports";
/// The ports come when the driver has found them, on a slow host late: the agent checks for them at the first of these
/// intervals, and ever less often up to the last.
const INTERVALS: RangeInclusive<Duration> = Duration::from_millis(200)..=Duration::from_secs(5);
/// How often the agent checks whether a program has connected.
const NOBODY: Duration = Duration::from_millis(100);
/// Bytes that are read at a time.
const CHUNK: usize = 16 << 10;

/// Starts it where there are such ports.
pub(crate) fn start(report: &Arc<AgentReport>) {
    if !Path::new(CLASS).is_dir() {
        return;
    }
    let report = report.clone();
    thread::spawn(move || {
        let mut seen = BTreeSet::new();
        let mut interval = *INTERVALS.start();
        loop {
            serve_new(&mut seen, &report);
            thread::sleep(interval);
            interval = (interval * 2).min(*INTERVALS.end());
        }
    });
}

/// Serves the ports that are not among the `seen` ones.
fn serve_new(seen: &mut BTreeSet<OsString>, report: &Arc<AgentReport>) {
    for entry in read_dir(CLASS).into_iter().flatten().flatten() {
        let Ok(name) = read_to_string(entry.path().join("name")) else {
            continue;
        };
        let name = name.trim().to_owned();
        if !seen.insert(entry.file_name()) {
            continue;
        }
        let device = Path::new("/dev").join(entry.file_name());
        match OpenOptions::new().read(true).write(true).open(&device) {
            Ok(port) => {
                report.line(format_args!("port name={name}"));
                let report = report.clone();
                thread::spawn(move || serve(port, &name, &report));
            }
            Err(error) => report.error(format_args!("port={name} expected=open got={error}")),
        }
    }
}

fn serve(mut port: File, name: &str, report: &AgentReport) {
    let mut bytes = 0;
    let mut chunk = vec![0; CHUNK];
    loop {
        match echo(&mut port, &mut chunk) {
            // No program is there, or it has gone.
            Ok(0) => {
                if std::mem::take(&mut bytes) > 0 {
                    report.line(format_args!("port name={name} end=eof"));
                }
                thread::sleep(NOBODY);
            }
            Ok(count) => bytes += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return report.error(format_args!("port={name} expected=an echo got={error}")),
        }
    }
}

/// Sends back what comes next; 0 at the end.
fn echo(port: &mut File, chunk: &mut [u8]) -> io::Result<usize> {
    let count = port.read(chunk)?;
    port.write_all(&chunk[..count])?;
    Ok(count)
}
