//! The entropy workload: random numbers from a device, which never come twice.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use crate::report::AgentReport;

/// So many that the same would never come again by chance.
const BLOCK: usize = 32;
/// Between two blocks: the device is busy, the guest is not.
const NAP: Duration = Duration::from_millis(10);

/// Starts the workload. It ends with the first error, which is reported.
pub(crate) fn start(device: String, report: Arc<AgentReport>) {
    thread::spawn(move || {
        let Err(error) = run(device.as_ref(), &report);
        report.error(format_args!("random={device} expected=new numbers got={error}"));
    });
}

fn run(device: &Path, report: &AgentReport) -> io::Result<std::convert::Infallible> {
    let mut from = File::open(device)?;
    // All zeroes are no numbers either.
    let mut last = [0; BLOCK];
    loop {
        let mut block = [0; BLOCK];
        from.read_exact(&mut block)?;
        if block == last || block == [0; BLOCK] {
            return Err(io::Error::other(format!("{block:x?} after {last:x?}")));
        }
        last = block;
        report.random.fetch_add(BLOCK as u64, Ordering::Relaxed);
        thread::sleep(NAP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_random_is_an_error() {
        let report = AgentReport::default();
        run("/dev/zero".as_ref(), &report).unwrap_err();
        assert_eq!(report.random.load(Ordering::Relaxed), 0);
        let file = tempfile::NamedTempFile::new().unwrap();
        let numbers = [[1; BLOCK], [2; BLOCK], [2; BLOCK]].concat();
        std::fs::write(file.path(), numbers).unwrap();
        run(file.path(), &report).unwrap_err();
        assert_eq!(report.random.load(Ordering::Relaxed), 2 * BLOCK as u64);
    }
}
