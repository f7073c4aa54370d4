//! The line by which a program on the host names the guest's port that it wants to connect to.

use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::packet::PORT_ANY;

/// Bytes of the longest valid line, with some to spare.
const LINE_MAX: usize = 32;

/// A program that has connected and has not yet sent its line.
#[derive(Debug)]
pub(super) struct Greeting {
    pub(super) stream: UnixStream,
    /// When the line must have come.
    pub(super) deadline: Instant,
}

/// What a program has sent so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GreetingStatus {
    /// No whole line yet.
    NotYet,
    /// The guest's port that the program wants.
    Port(u32),
    /// Something else than such a line, or the program has closed.
    Nonsense,
}

impl Greeting {
    /// Reads the line from the stream if it is there, and not a byte of what follows it.
    pub(super) fn read_port(&self) -> GreetingStatus {
        let mut line = [0; LINE_MAX];
        let seen = match recv_retrying(&self.stream, &mut line, RecvFlags::PEEK) {
            Ok(0) => return GreetingStatus::Nonsense,
            Ok(seen) => seen,
            Err(Errno::AGAIN) => return GreetingStatus::NotYet,
            Err(_) => return GreetingStatus::Nonsense,
        };
        match line[..seen].iter().position(|byte| *byte == b'\n') {
            Some(end) => match recv_retrying(&self.stream, &mut line[..=end], RecvFlags::empty()) {
                Ok(taken) if taken == end + 1 => parse(&line[..end]),
                _ => GreetingStatus::Nonsense,
            },
            None if seen < LINE_MAX => GreetingStatus::NotYet,
            None => GreetingStatus::Nonsense,
        }
    }
}

fn recv_retrying(stream: &UnixStream, into: &mut [u8], flags: RecvFlags) -> Result<usize, Errno> {
    loop {
        match recv(stream, &mut *into, flags | RecvFlags::DONTWAIT) {
            Err(Errno::INTR) => {}
            received => return received.map(|(count, _)| count),
        }
    }
}

/// Parses a line without its newline.
fn parse(line: &[u8]) -> GreetingStatus {
    let port = std::str::from_utf8(line).ok().and_then(|line| {
        let (word, port) = line.trim_end().split_once(' ')?;
        let port: u32 = port.trim_start().parse().ok()?;
        (word.eq_ignore_ascii_case("connect") && port != PORT_ANY).then_some(port)
    });
    port.map_or(GreetingStatus::Nonsense, GreetingStatus::Port)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn pair() -> (UnixStream, Greeting) {
        let (client, stream) = UnixStream::pair().unwrap();
        let deadline = Instant::now();
        (client, Greeting { stream, deadline })
    }

    #[test]
    fn the_line_is_taken_and_nothing_else() {
        let (mut client, mut greeting) = pair();
        assert_eq!(greeting.read_port(), GreetingStatus::NotYet);
        client.write_all(b"CONN").unwrap();
        assert_eq!(greeting.read_port(), GreetingStatus::NotYet);
        client.write_all(b"ECT 1024\nCONNECT 7\n").unwrap();
        assert_eq!(greeting.read_port(), GreetingStatus::Port(1024));
        drop(client);
        let mut rest = String::new();
        greeting.stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "CONNECT 7\n");
    }

    #[test]
    fn nonsense_is_told_from_a_slow_start() {
        for line in [
            "\n",
            "CONNECT\n",
            "CONNECT x\n",
            "LISTEN 1\n",
            "CONNECT 4294967295\n",
            "CONNECT 99999999999\n",
        ] {
            let (mut client, greeting) = pair();
            client.write_all(line.as_bytes()).unwrap();
            assert_eq!(greeting.read_port(), GreetingStatus::Nonsense, "{line:?}");
        }
        let (mut client, greeting) = pair();
        client.write_all(&[b'C'; LINE_MAX]).unwrap();
        assert_eq!(greeting.read_port(), GreetingStatus::Nonsense);
        let (client, greeting) = pair();
        drop(client);
        assert_eq!(greeting.read_port(), GreetingStatus::Nonsense);
        assert_eq!(parse(b"connect 5\r"), GreetingStatus::Port(5));
    }
}
