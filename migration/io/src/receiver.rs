//! Receives ranges of guest memory, and wakes the thread that waits for them only when enough has come.

use std::os::fd::BorrowedFd;

use crate::socket::{is_tcp, set_option};
use crate::{CallProgress, MemoryIoError, Scatter};

/// Bytes for which a thread is woken while more are to come.
const WAKE_BYTES: libc::c_int = 256 << 10;

/// Receives [`Scatter`]s from one socket and, on TCP, lets poll(2) report it readable only when 256 KiB of
/// the content, or what is left of it, have come: over loopback that is a quarter to a half of the wake-ups.
///
/// A peer that ends or loses the connection is reported at once all the same. Between one scatter that is
/// [`CallProgress::Done`] and the next the socket wakes for every byte, as usual; so it does after
/// [`PageReceiver::pause`], for a caller that gives a scatter up half-way.
#[derive(Debug)]
pub struct PageReceiver {
    /// Bytes that the socket wakes for; `None` where it has no such threshold.
    threshold: Option<libc::c_int>,
}

impl PageReceiver {
    /// For a socket, which every later call must name again.
    pub fn new(socket: BorrowedFd<'_>) -> Self {
        Self {
            threshold: is_tcp(socket).then_some(1),
        }
    }

    /// Receives as much as the socket has now, like [`Scatter::step`].
    pub fn receive(
        &mut self,
        scatter: &mut Scatter<'_>,
        socket: BorrowedFd<'_>,
    ) -> Result<CallProgress, MemoryIoError> {
        let progress = scatter.step(socket)?;
        match progress {
            // Never more than will come, or nothing would ever wake the caller.
            CallProgress::WouldBlock => {
                let left = libc::c_int::try_from(scatter.left()).unwrap_or(WAKE_BYTES);
                self.wake_for(left.min(WAKE_BYTES), socket)?;
            }
            CallProgress::Done => self.wake_for(1, socket)?,
            CallProgress::Moved(_) => {}
        }
        Ok(progress)
    }

    /// Lets the socket wake for every byte again.
    pub fn pause(&mut self, socket: BorrowedFd<'_>) -> Result<(), MemoryIoError> {
        self.wake_for(1, socket)
    }

    fn wake_for(&mut self, bytes: libc::c_int, socket: BorrowedFd<'_>) -> Result<(), MemoryIoError> {
        if self.threshold.is_some_and(|now| now != bytes) {
            set_option(socket, libc::SO_RCVLOWAT, bytes).map_err(MemoryIoError::Socket)?;
            self.threshold = Some(bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::{GuestMemory, MemoryRange};

    const LEN: usize = 1 << 20;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), LEN)]).unwrap()
    }

    fn scatter(memory: &GuestMemory, len: usize) -> Scatter<'_> {
        let range = MemoryRange {
            gpa: 0,
            len: len as u64,
        };
        Scatter::new(memory, &[range]).unwrap()
    }

    fn tcp_pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        near.set_nodelay(true).unwrap();
        (near, listener.accept().unwrap().0)
    }

    fn readable(socket: impl AsFd, timeout: Option<&Timespec>) -> bool {
        let mut events = [PollFd::new(&socket, PollFlags::IN)];
        poll(&mut events, timeout).unwrap() == 1
    }

    const NOW: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };

    #[test]
    fn a_little_content_does_not_wake_the_receiver_and_its_rest_does_and_then_every_byte() {
        let memory = memory();
        let (mut near, far) = tcp_pair();
        let mut receiver = PageReceiver::new(far.as_fd());
        let mut scatter = scatter(&memory, 3000);
        assert_eq!(
            receiver.receive(&mut scatter, far.as_fd()).unwrap(),
            CallProgress::WouldBlock
        );
        near.write_all(&[1; 2999]).unwrap();
        // Loopback delivers within the call.
        assert!(!readable(&far, Some(&NOW)));
        near.write_all(&[2; 1]).unwrap();
        assert!(readable(&far, None));
        assert_eq!(
            receiver.receive(&mut scatter, far.as_fd()).unwrap(),
            CallProgress::Done
        );
        let mut last = [0; 2];
        memory.read_slice(&mut last, GuestAddress(2998)).unwrap();
        assert_eq!(last, [1, 2]);
        near.write_all(b"h").unwrap();
        assert!(readable(&far, None));
    }

    #[test]
    fn a_batch_that_trickles_in_any_pieces_arrives() {
        for piece in [1000, 65537, LEN] {
            let memory = memory();
            let (mut near, far) = tcp_pair();
            let writer = std::thread::spawn(move || {
                for bytes in vec![7u8; 4 * LEN].chunks(piece) {
                    near.write_all(bytes).unwrap();
                }
                near
            });
            let mut receiver = PageReceiver::new(far.as_fd());
            for _ in 0..4 {
                let mut scatter = scatter(&memory, LEN);
                while receiver.receive(&mut scatter, far.as_fd()).unwrap() != CallProgress::Done {
                    assert!(readable(&far, None));
                }
            }
            let mut all = vec![0; LEN];
            memory.read_slice(&mut all, GuestAddress(0)).unwrap();
            assert!(all.iter().all(|byte| *byte == 7));
            drop(writer.join().unwrap());
        }
    }

    #[test]
    fn the_end_of_the_connection_wakes_and_a_pause_makes_every_byte_count() {
        let memory = memory();
        let (mut near, far) = tcp_pair();
        let mut receiver = PageReceiver::new(far.as_fd());
        let mut content = scatter(&memory, LEN);
        assert_eq!(
            receiver.receive(&mut content, far.as_fd()).unwrap(),
            CallProgress::WouldBlock
        );
        near.write_all(&[1; 5]).unwrap();
        assert!(!readable(&far, Some(&NOW)));
        receiver.pause(far.as_fd()).unwrap();
        assert!(readable(&far, Some(&NOW)));
        assert_eq!(
            receiver.receive(&mut content, far.as_fd()).unwrap(),
            CallProgress::Moved(5)
        );
        assert_eq!(
            receiver.receive(&mut content, far.as_fd()).unwrap(),
            CallProgress::WouldBlock
        );
        drop(near);
        assert!(readable(&far, None));
        assert!(matches!(
            receiver.receive(&mut content, far.as_fd()),
            Err(MemoryIoError::Closed)
        ));
    }

    #[test]
    fn a_unix_socket_is_left_as_it_is() {
        let memory = memory();
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut receiver = PageReceiver::new(far.as_fd());
        let mut content = scatter(&memory, 2);
        assert_eq!(
            receiver.receive(&mut content, far.as_fd()).unwrap(),
            CallProgress::WouldBlock
        );
        near.write_all(&[1]).unwrap();
        assert!(readable(&far, Some(&NOW)));
        assert_eq!(
            receiver.receive(&mut content, far.as_fd()).unwrap(),
            CallProgress::Moved(1)
        );
        assert_eq!(receiver.threshold, None);
    }
}
