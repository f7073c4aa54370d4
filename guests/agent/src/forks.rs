//! Reports that the kernel was given a new generation ID, by what it logs: Linux 6.1 has no other sign of that.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;
use std::thread;

use crate::report::AgentReport;

/// What the kernel's random number generator says when it is given a new generation ID.
const SIGN: &str = "virtual machine fork";
/// More than a message of the kernel has (Documentation/ABI/testing/dev-kmsg).
const MESSAGE: usize = 8192;

/// Reports each from now on.
pub(crate) fn watch(report: Arc<AgentReport>) -> std::io::Result<()> {
    let mut log = File::open("/dev/kmsg")?;
    log.seek(SeekFrom::End(0))?;
    thread::spawn(move || {
        let (mut message, mut count) = ([0; MESSAGE], 0);
        loop {
            match log.read(&mut message) {
                Ok(len) if String::from_utf8_lossy(&message[..len]).contains(SIGN) => {
                    count += 1;
                    report.line(format_args!("fork n={count}"));
                }
                Ok(1..) => {}
                // Messages were overwritten before they were read; the next read gets the oldest that is left.
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
                Ok(0) | Err(_) => return,
            }
        }
    });
    Ok(())
}
