//! The sender with and without the kernel's copy, on sockets of this process.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{GuestMemory, MemoryRange, Piece};

const PAGES: u64 = 256;
const LEN: usize = 1 << 20;

fn memory() -> GuestMemory {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), LEN)]).unwrap();
    let bytes: Vec<u8> = (0..LEN).map(|at| (at / 7) as u8 ^ (at >> 12) as u8).collect();
    memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    memory
}

fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

fn page<'a>(number: u64) -> Piece<'a> {
    Piece::Guest(MemoryRange {
        gpa: number % PAGES * 4096,
        len: 4096,
    })
}

fn wait(socket: impl AsFd, flags: PollFlags) -> PollFlags {
    let mut events = [PollFd::new(&socket, flags)];
    poll(&mut events, None).unwrap();
    events[0].revents()
}

/// Sends every other page with a header before each batch, so that no two ranges are neighbours.
fn send_batches(sender: &mut PageSender, memory: &GuestMemory, socket: impl AsFd, batches: u8) -> Vec<u8> {
    let mut expected = Vec::new();
    for batch in 0..batches {
        let header = [batch; 20];
        let pages = (0..PAGES)
            .step_by(2)
            .map(|number| page(number + u64::from(batch)));
        let mut gather = Gather::new(memory, [Piece::Bytes(&header)].into_iter().chain(pages)).unwrap();
        while sender.send(&mut gather, socket.as_fd()).unwrap() != CallProgress::Done {
            wait(&socket, PollFlags::OUT);
        }
        expected.extend_from_slice(&header);
        for number in (0..PAGES).step_by(2) {
            let mut bytes = [0; 4096];
            let gpa = (number + u64::from(batch)) % PAGES * 4096;
            memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
            expected.extend_from_slice(&bytes);
        }
    }
    expected
}

#[test]
fn on_loopback_the_probes_tell_that_the_kernel_copies_and_nothing_is_lost() {
    let memory = memory();
    let (near, mut far) = tcp_pair();
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        far.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let mut sender = PageSender::new(near.as_fd());
    assert_eq!(sender.mode, SendMode::Probing);
    let mut expected = Vec::new();
    // Each turn has room for one probe at least.
    for _ in 0..=PROBES {
        expected.extend(send_batches(&mut sender, &memory, &near, 2));
        while sender.drain(near.as_fd()).unwrap() != CallProgress::Done {
            assert!(wait(&near, PollFlags::empty()).contains(PollFlags::ERR));
        }
    }
    assert_eq!((sender.pending(), sender.path()), (0, SendPath::Gather));
    assert_eq!(sender.mode, SendMode::Gather);
    let counters = sender.counters();
    assert_eq!(
        counters.gather_bytes + counters.zerocopy_bytes,
        expected.len() as u64
    );
    assert!(counters.zerocopy_bytes <= PROBES * PROBE_BYTES as u64);
    assert_eq!((counters.copied, counters.zerocopy_sends), (PROBES, PROBES));
    drop(near);
    assert!(reader.join().unwrap() == expected);
}

#[test]
fn a_unix_socket_is_gathered() {
    let memory = memory();
    let (near, mut far) = UnixStream::pair().unwrap();
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        far.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let mut sender = PageSender::new(near.as_fd());
    let expected = send_batches(&mut sender, &memory, &near, 3);
    assert_eq!(sender.drain(near.as_fd()).unwrap(), CallProgress::Done);
    assert_eq!(
        sender.counters(),
        SendCounters {
            gather_bytes: expected.len() as u64,
            ..SendCounters::default()
        }
    );
    drop(near);
    assert!(reader.join().unwrap() == expected);
}

#[test]
fn small_pieces_are_never_sent_without_a_copy() {
    let memory = memory();
    let (near, mut far) = tcp_pair();
    let mut sender = PageSender::new(near.as_fd());
    let pieces = (0..7).map(page).chain([Piece::Bytes(b"end")]);
    let mut gather = Gather::new(&memory, pieces).unwrap();
    assert_eq!(
        sender.send(&mut gather, near.as_fd()).unwrap(),
        CallProgress::Done
    );
    assert_eq!(sender.counters().zerocopy_sends, 0);
    assert_eq!(sender.mode, SendMode::Probing);
    let mut bytes = vec![0; 7 * 4096 + 3];
    far.read_exact(&mut bytes).unwrap();
    assert!(bytes.ends_with(b"end"));
}

#[test]
fn waiting_for_completions_ends_when_the_connection_is_reset() {
    let memory = memory();
    let (near, far) = tcp_pair();
    let mut sender = PageSender::new(near.as_fd());
    let mut gather = Gather::new(&memory, (0..PAGES).map(page)).unwrap();
    while sender.send(&mut gather, near.as_fd()).unwrap() != CallProgress::WouldBlock {
        gather = Gather::new(&memory, (0..PAGES).map(page)).unwrap();
    }
    // Closed with data unread: a reset.
    drop(far);
    wait(&near, PollFlags::empty());
    let ended = loop {
        match sender.drain(near.as_fd()) {
            Ok(CallProgress::WouldBlock) => _ = wait(&near, PollFlags::empty()),
            ended => break ended,
        }
    };
    assert!(
        matches!(ended, Ok(CallProgress::Done) | Err(MemoryIoError::Socket(_))),
        "{ended:?}"
    );
    assert!(sender.send(&mut gather, near.as_fd()).is_err());
}

fn probing(zerocopy_sends: u64) -> PageSender {
    let counters = SendCounters {
        zerocopy_sends,
        ..SendCounters::default()
    };
    PageSender {
        mode: SendMode::Probing,
        counters,
        unjudged: (0, 0),
    }
}

#[test]
fn completions_without_a_copy_keep_the_path_until_most_say_otherwise() {
    let mut sender = probing(2 * WINDOW + 4);
    let run = VectorRun {
        guest: true,
        vectors: 1,
        bytes: MIN_ZEROCOPY,
    };
    let complete =
        |sender: &mut PageSender, sends, copied| sender.count_completion(Completion { sends, copied });
    complete(&mut sender, 0, true);
    assert_eq!(
        sender.mode,
        SendMode::Probing,
        "an entry that is no completion says nothing"
    );
    complete(&mut sender, 3, false);
    assert_eq!(sender.path(), SendPath::Zerocopy);
    assert!(sender.takes_zerocopy(run));
    assert!(!sender.takes_zerocopy(VectorRun { guest: false, ..run }));
    assert!(!sender.takes_zerocopy(VectorRun {
        bytes: MIN_ZEROCOPY - 1,
        ..run
    }));
    complete(&mut sender, WINDOW / 2, true);
    complete(&mut sender, WINDOW / 2, false);
    assert_eq!(sender.path(), SendPath::Zerocopy, "half of a window");
    complete(&mut sender, WINDOW - 1, true);
    assert_eq!(sender.path(), SendPath::Zerocopy, "too few to tell");
    complete(&mut sender, 1, true);
    assert_eq!(sender.path(), SendPath::Gather);
    let left = sender.pending();
    complete(&mut sender, left, false);
    assert_eq!(
        (sender.path(), sender.pending()),
        (SendPath::Gather, 0),
        "for good"
    );
    complete(&mut sender, 1, false);
    assert_eq!(sender.pending(), 0, "no more can complete than were sent");
}

#[test]
fn probes_that_were_copied_say_little_until_there_are_many() {
    let copied = Completion {
        sends: 1,
        copied: true,
    };
    let mut sender = probing(PROBES + WINDOW);
    (1..PROBES).for_each(|_| sender.count_completion(copied));
    assert_eq!(sender.mode, SendMode::Probing);
    let mut hopeless = PageSender { ..sender };
    hopeless.count_completion(copied);
    assert_eq!(hopeless.mode, SendMode::Gather);
    sender.count_completion(Completion {
        sends: 1,
        copied: false,
    });
    assert_eq!(sender.mode, SendMode::Zerocopy);
    // The probes before do not count against it.
    (1..WINDOW).for_each(|_| sender.count_completion(copied));
    assert_eq!(sender.mode, SendMode::Zerocopy);
}

#[test]
fn sends_under_way_are_bounded_and_a_probe_is_alone() {
    let run = VectorRun {
        guest: true,
        vectors: 1,
        bytes: LEN,
    };
    assert!(probing(0).takes_zerocopy(run));
    assert!(!probing(1).takes_zerocopy(run));
    let mut sender = probing(MAX_PENDING + 1);
    sender.count_completion(Completion {
        sends: 1,
        copied: false,
    });
    assert!(!sender.takes_zerocopy(run));
    sender.count_completion(Completion {
        sends: 1,
        copied: false,
    });
    assert!(sender.takes_zerocopy(run));
}

#[test]
fn a_kernel_without_buffers_is_asked_again_only_if_some_can_come_back() {
    let mut sender = probing(2);
    sender.count_no_buffers();
    assert_eq!(sender.mode, SendMode::Probing);
    sender.count_completion(Completion {
        sends: 2,
        copied: false,
    });
    sender.count_no_buffers();
    assert_eq!((sender.mode, sender.counters().no_buffers), (SendMode::Gather, 2));
}
