//! The control channel between the lab and the first program of a host: frames on a virtio-serial port.
//!
//! A frame is a kind (1 byte), the number of a process (4), the length of a body (4), all little endian, and
//! the body. The host begins with [`LabFrameKind::Hello`]; nothing is sent to it before.

use std::io::{self, Read, Write};

/// Longest body.
pub const LONGEST: usize = 64 << 10;

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LabFrameKind {
    /// From the host: it is up.
    Hello = 1,
    /// To the host: start a process; the body is its words, each ended by a zero.
    Spawn = 2,
    /// To the host: bytes for the process's standard input; an empty body ends it.
    Stdin = 3,
    /// To the host: a signal; the body is its number (4 bytes).
    Signal = 4,
    /// From the host: the process could not be started; the body says why.
    Refused = 5,
    /// From the host: bytes of the process's standard output.
    Stdout = 6,
    /// From the host: bytes of its standard error.
    Stderr = 7,
    /// From the host: the process has ended and so has its output; the body is the wait status (4 bytes).
    Exit = 8,
    /// To the host: as `Spawn`, with a terminal as its standard input, output and error.
    Terminal = 9,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabFrame {
    /// What it says.
    pub kind: LabFrameKind,
    /// The process that it is about, numbered by the lab.
    pub process: u32,
    /// See [`LabFrameKind`].
    pub body: Vec<u8>,
}

/// Writes a frame in one piece. Bodies longer than [`LONGEST`] are `InvalidInput`.
pub fn write(to: &mut impl Write, kind: LabFrameKind, process: u32, body: &[u8]) -> io::Result<()> {
    if body.len() > LONGEST {
        let text = format!("a frame of {} bytes, at most {LONGEST} are allowed", body.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut frame = Vec::with_capacity(9 + body.len());
    frame.push(kind as u8);
    frame.extend_from_slice(&process.to_le_bytes());
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(body);
    to.write_all(&frame)?;
    to.flush()
}

/// Reads a frame. The end of the channel is `UnexpectedEof`, nonsense is `InvalidData`.
pub fn read(from: &mut impl Read) -> io::Result<LabFrame> {
    let mut head = [0; 9];
    from.read_exact(&mut head)?;
    let [kind, p0, p1, p2, p3, l0, l1, l2, l3] = head;
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let kind = LabFrameKind::from_byte(kind)
        .ok_or_else(|| invalid(format!("expected a kind of frame, got {kind}")))?;
    let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if len > LONGEST {
        return Err(invalid(format!(
            "expected a frame of at most {LONGEST} bytes, got {len}"
        )));
    }
    let mut body = vec![0; len];
    from.read_exact(&mut body)?;
    Ok(LabFrame {
        kind,
        process: u32::from_le_bytes([p0, p1, p2, p3]),
        body,
    })
}

impl LabFrameKind {
    fn from_byte(byte: u8) -> Option<Self> {
        use LabFrameKind::{Exit, Hello, Refused, Signal, Spawn, Stderr, Stdin, Stdout, Terminal};
        let all = [
            Hello, Spawn, Stdin, Signal, Refused, Stdout, Stderr, Exit, Terminal,
        ];
        all.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// The words of a command as a body of [`LabFrameKind::Spawn`].
pub fn join<'a>(words: impl IntoIterator<Item = &'a str>) -> Vec<u8> {
    words
        .into_iter()
        .flat_map(|word| word.bytes().chain([0]))
        .collect()
}

/// The words in a body of [`LabFrameKind::Spawn`].
pub fn split(body: &[u8]) -> Vec<String> {
    let words = body.strip_suffix(&[0]).unwrap_or(body).split(|byte| *byte == 0);
    words
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were() {
        let mut bytes = Vec::new();
        write(&mut bytes, LabFrameKind::Stdout, 7, b"hello").unwrap();
        write(&mut bytes, LabFrameKind::Stdin, u32::MAX, b"").unwrap();
        let mut from = bytes.as_slice();
        assert_eq!(
            read(&mut from).unwrap(),
            LabFrame {
                kind: LabFrameKind::Stdout,
                process: 7,
                body: b"hello".to_vec()
            }
        );
        assert_eq!(
            read(&mut from).unwrap(),
            LabFrame {
                kind: LabFrameKind::Stdin,
                process: u32::MAX,
                body: vec![]
            }
        );
        assert_eq!(read(&mut from).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn nonsense_is_refused_before_it_is_allocated() {
        let mut long = vec![1, 0, 0, 0, 0];
        long.extend(u32::MAX.to_le_bytes());
        for bytes in [&long[..], &[0; 9], &[9; 9]] {
            assert_eq!(
                read(&mut &bytes[..]).unwrap_err().kind(),
                io::ErrorKind::InvalidData
            );
        }
        let error = write(&mut Vec::new(), LabFrameKind::Stdin, 0, &vec![0; LONGEST + 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn words_may_be_empty() {
        let words = ["sh", "-c", "", "a b"];
        assert_eq!(split(&join(words)), words);
    }
}
