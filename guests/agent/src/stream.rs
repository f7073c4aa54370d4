//! The network workload: one TCP stream to a server that sends everything back, checked block by block.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use guest_core::fill_body;

use crate::report::AgentReport;

const BLOCK_WORDS: usize = 2048;
/// Between two blocks: the stream is busy, the guest is not.
const NAP: Duration = Duration::from_millis(10);

/// Starts the workload. It ends with the first error, which is reported.
pub(crate) fn start(peer: SocketAddr, report: Arc<AgentReport>) {
    thread::spawn(move || {
        if let Err(error) = run(peer, &report) {
            report.error(format_args!("stream={peer} expected=everything back got={error}"));
        }
    });
}

fn run(peer: SocketAddr, report: &AgentReport) -> io::Result<()> {
    let mut from = TcpStream::connect(peer)?;
    let mut to = from.try_clone()?;
    thread::scope(|scope| {
        let writer = scope.spawn(move || -> io::Result<()> {
            for number in 0.. {
                to.write_all(&block(number))?;
                thread::sleep(NAP);
            }
            Ok(())
        });
        check(&mut from, report)?;
        writer.join().map_err(|_| io::Error::other("a panic"))?
    })
}

/// Reads what comes back until it is not what was sent.
fn check(from: &mut TcpStream, report: &AgentReport) -> io::Result<()> {
    let mut got = vec![0; BLOCK_WORDS * 8];
    for number in 0.. {
        from.read_exact(&mut got)?;
        if got != block(number) {
            from.shutdown(std::net::Shutdown::Both)?;
            return Err(io::Error::other(format!("another block than {number}")));
        }
        report.streamed.fetch_add(got.len() as u64, Ordering::Relaxed);
    }
    Ok(())
}

fn block(number: u64) -> Vec<u8> {
    let mut words = vec![0; BLOCK_WORDS];
    fill_body(number, &mut words);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A peer that sends back what `change` makes of each block, so many times.
    fn peer(blocks: u64, change: fn(&mut [u8])) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = vec![0; BLOCK_WORDS * 8];
            for number in 0..=blocks {
                stream.read_exact(&mut bytes).unwrap();
                if number == blocks {
                    change(&mut bytes);
                }
                if stream.write_all(&bytes).is_err() {
                    return;
                }
            }
        });
        address
    }

    #[test]
    fn damage_and_the_end_are_errors() {
        let report = AgentReport::default();
        let error = run(peer(3, |bytes| bytes[9] ^= 1), &report).unwrap_err();
        assert_eq!(error.to_string(), "another block than 3");
        assert_eq!(
            report.streamed.load(Ordering::Relaxed),
            3 * 8 * BLOCK_WORDS as u64
        );
        run(peer(1, |_| ()), &report).unwrap_err();
    }
}
