//! Guest memory over sockets, byte by byte: ranges, marks, zero pages, digests.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::*;

const HIGH: u64 = 1 << 32;

/// Whether the page at `gpa` holds nothing but zeroes.
fn is_zero_page(memory: &GuestMemory, gpa: u64) -> Result<bool, MemoryIoError> {
    Ok(zero_pages(memory, gpa, 1)? != 0)
}

/// Two regions with a hole in between: 16 pages at 0, 8 pages at 4 GiB.
fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 12), (GuestAddress(HIGH), 8 << 12)]).unwrap()
}

fn fill(memory: &GuestMemory, seed: u8) {
    for region in memory.iter() {
        let bytes: Vec<u8> = (0..region.len())
            .map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed))
            .collect();
        memory.write_slice(&bytes, region.start_addr()).unwrap();
    }
}

fn range(gpa: u64, len: u64) -> MemoryRange {
    MemoryRange { gpa, len }
}

fn marked(memory: &GuestMemory) -> usize {
    memory
        .iter()
        .map(|region| {
            (0..region.len())
                .step_by(4096)
                .filter(|at| region.bitmap().dirty_at(*at as usize))
                .count()
        })
        .sum()
}

#[test]
fn ranges_arrive_in_place_and_unmarked_through_a_socket_that_is_too_small() {
    let (from, to) = (memory(), memory());
    fill(&from, 7);
    let ranges = [range(0x3000, 0x5000), range(HIGH, 0x8000), range(0, 0x1000)];
    let (a, mut b) = UnixStream::pair().unwrap();
    let mut pieces = vec![Piece::Bytes(b"head"), Piece::Bytes(b"")];
    pieces.extend(ranges.map(Piece::Guest));
    let mut gather = Gather::new(&from, pieces).unwrap();
    let mut head = [0; 4];
    assert_eq!(
        Scatter::new(&to, &ranges).unwrap().step(b.as_fd()).unwrap(),
        CallProgress::WouldBlock
    );
    let mut scatter = Scatter::new(&to, &ranges).unwrap();
    let mut started = false;
    loop {
        let sent = gather.step(a.as_fd()).unwrap();
        if !started {
            b.read_exact(&mut head).unwrap();
            started = true;
        }
        let got = scatter.step(b.as_fd()).unwrap();
        if got == CallProgress::Done {
            assert_eq!(sent, CallProgress::Done);
            break;
        }
    }
    assert_eq!(&head, b"head");
    for range in ranges {
        let (mut x, mut y) = (vec![0; range.len as usize], vec![0; range.len as usize]);
        from.read_slice(&mut x, GuestAddress(range.gpa)).unwrap();
        to.read_slice(&mut y, GuestAddress(range.gpa)).unwrap();
        assert_eq!(x, y);
    }
    assert_eq!(marked(&to), 0);
    assert!(
        is_zero_page(&to, 0x1000).unwrap(),
        "pages that were not named stay as they were"
    );
}

#[test]
fn more_ranges_than_one_call_takes_are_sent_in_several() {
    let memory = memory();
    fill(&memory, 1);
    let pieces: Vec<Piece<'_>> = (0..3000).map(|at| Piece::Guest(range(at % 4096, 5))).collect();
    let (a, mut b) = UnixStream::pair().unwrap();
    let mut gather = Gather::new(&memory, pieces).unwrap();
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; 15000];
        b.read_exact(&mut bytes).unwrap();
        bytes
    });
    let mut calls = 0;
    while gather.step(a.as_fd()).unwrap() != CallProgress::Done {
        calls += 1;
    }
    assert!(calls >= 2);
    let mut expected = vec![0; 15000];
    for (at, part) in expected.chunks_mut(5).enumerate() {
        memory.read_slice(part, GuestAddress(at as u64 % 4096)).unwrap();
    }
    assert_eq!(reader.join().unwrap(), expected);
}

#[test]
fn a_range_outside_memory_is_refused_by_name() {
    let memory = memory();
    for (gpa, len) in [
        (16 << 12, 1),
        (0xf000, 0x2000),
        (HIGH - 1, 1),
        (u64::MAX, 2),
        (0, u64::MAX),
        (HIGH + 0x7fff, 2),
    ] {
        let error = Scatter::new(&memory, &[range(gpa, len)]).err().unwrap();
        assert!(matches!(error, MemoryIoError::OutOfBounds { .. }), "{error}");
        assert!(error.to_string().contains(&format!("{gpa:#x}")), "{error}");
        assert!(Gather::new(&memory, [Piece::Guest(range(gpa, len))]).is_err());
        assert!(zero_range(&memory, range(gpa, len)).is_err());
    }
    assert!(matches!(
        is_zero_page(&memory, 16 << 12),
        Err(MemoryIoError::OutOfBounds { .. })
    ));
    assert!(matches!(
        is_zero_page(&memory, 12),
        Err(MemoryIoError::Unaligned { gpa: 12 })
    ));
}

#[test]
fn a_peer_that_is_gone_is_an_error_on_either_side() {
    let memory = memory();
    let (a, b) = UnixStream::pair().unwrap();
    drop(b);
    let mut scatter = Scatter::new(&memory, &[range(0, 4096)]).unwrap();
    assert!(matches!(scatter.step(a.as_fd()), Err(MemoryIoError::Closed)));
    let mut gather = Gather::new(&memory, [Piece::Guest(range(0, 4096))]).unwrap();
    assert!(matches!(gather.step(a.as_fd()), Err(MemoryIoError::Socket(_))));
}

#[test]
fn zeroing_clears_and_does_not_mark() {
    let memory = memory();
    fill(&memory, 3);
    for region in memory.iter() {
        region.get_mmap().bitmap().clear_all();
    }
    zero_range(&memory, range(0x2000, 0x3000)).unwrap();
    let zero: Vec<u64> = (0..16)
        .filter(|page| is_zero_page(&memory, page << 12).unwrap())
        .collect();
    assert_eq!(zero, [2, 3, 4]);
    assert_eq!(marked(&memory), 0);
}

#[test]
fn the_digest_is_that_of_all_blocks_in_order() {
    let memory = memory();
    fill(&memory, 9);
    let mut all = vec![0; 24 << 12];
    let (low, high) = all.split_at_mut(16 << 12);
    memory.read_slice(low, GuestAddress(0)).unwrap();
    memory.read_slice(high, GuestAddress(HIGH)).unwrap();
    // Each region is shorter than a block.
    let expected = |all: &[u8]| {
        let (low, high) = all.split_at(16 << 12);
        digest_of_blocks(&[low, high].map(xxhash_rust::xxh3::xxh3_128))
    };
    assert_eq!(digest(&memory).unwrap(), expected(&all));
    // With zeroes in place of two pages.
    let is_unused = |gpa| [0x2000, HIGH + 0x7000].contains(&gpa);
    let without = || {
        let of = |block| digest_block(&memory, block, is_unused, &mut Vec::new()).unwrap();
        digest_of_blocks(&digest_blocks(&memory).into_iter().map(of).collect::<Vec<_>>())
    };
    all[0x2000..0x3000].fill(0);
    all[0x17000..].fill(0);
    assert_eq!(without(), expected(&all));
    memory.write_slice(&[1], GuestAddress(HIGH + 0x6fff)).unwrap();
    assert_ne!(without(), expected(&all));
    assert_ne!(digest(&memory).unwrap(), expected(&all));
}

#[test]
fn what_is_sent_by_hand_is_received_by_bits() {
    let memory = memory();
    let (mut a, b) = UnixStream::pair().unwrap();
    let mut scatter = Scatter::new(&memory, &[range(0xfff, 2), range(0x5000, 1)]).unwrap();
    a.write_all(&[1]).unwrap();
    assert_eq!(scatter.step(b.as_fd()).unwrap(), CallProgress::Moved(1));
    assert_eq!(scatter.step(b.as_fd()).unwrap(), CallProgress::WouldBlock);
    a.write_all(&[2, 3, 4]).unwrap();
    assert_eq!(scatter.step(b.as_fd()).unwrap(), CallProgress::Done);
    let byte = |gpa| memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();
    assert_eq!(
        [byte(0xfff), byte(0x1000), byte(0x5000), byte(0x5001)],
        [1, 2, 3, 0]
    );
}

#[test]
fn only_candidates_are_read_and_they_lie_within_one_region() {
    let memory = memory();
    memory.write_slice(&[1], GuestAddress(0x3fff)).unwrap();
    assert_eq!(zero_pages(&memory, 0, 0xffff).unwrap(), 0xfff7);
    assert_eq!(zero_pages(&memory, 0x2000, 0b1011).unwrap(), 0b1001);
    assert_eq!(
        zero_pages(&memory, HIGH - (60 << 12), 0xf << 60).unwrap(),
        0xf << 60
    );
    assert_eq!(zero_pages(&memory, 1 << 40, 0).unwrap(), 0);
    for (gpa, candidates) in [
        (0, 1 << 16),
        (0xf000, 0b11),
        (HIGH - 0x1000, 0b11),
        (u64::MAX << 12, 1),
        (u64::MAX << 12, 1 << 63),
        (u64::MAX << 12, 0b11),
    ] {
        let error = zero_pages(&memory, gpa, candidates).unwrap_err();
        assert!(matches!(error, MemoryIoError::OutOfBounds { .. }), "{error}");
    }
    assert!(matches!(
        zero_pages(&memory, 8, 1),
        Err(MemoryIoError::Unaligned { gpa: 8 })
    ));
}

#[test]
fn populating_makes_pages_resident_and_keeps_their_content() {
    let (memory, twin) = (memory(), memory());
    for memory in [&memory, &twin] {
        memory.write_slice(&[5; 100], GuestAddress(0x4010)).unwrap();
        for region in memory.iter() {
            region.get_mmap().bitmap().clear_all();
        }
    }
    let base = memory.get_host_address(GuestAddress(0x2000)).unwrap();
    assert_eq!(resident(base, 4), [false, false, true, false]);
    populate(&memory, range(0x2000, 0x3000)).unwrap();
    populate(&memory, range(HIGH, 0x8000)).unwrap();
    populate(&memory, range(0, 0)).unwrap();
    assert_eq!(resident(base, 4), [true, true, true, false]);
    assert_eq!(marked(&memory), 0);
    assert_eq!(digest(&memory).unwrap(), digest(&twin).unwrap());
    assert!(matches!(
        populate(&memory, range(0xf000, 0x2000)),
        Err(MemoryIoError::OutOfBounds { .. })
    ));
    assert!(matches!(
        populate(&memory, range(1, 0x1000)),
        Err(MemoryIoError::Unaligned { gpa: 1 })
    ));
}

/// Which pages are resident.
#[allow(unsafe_code)] // mincore takes a pointer.
fn resident(base: *mut u8, pages: usize) -> Vec<bool> {
    let mut bytes = vec![0; pages];
    // SAFETY: the pages are mapped, and the answer has room for a byte for each.
    let done = unsafe { libc::mincore(base.cast(), pages << 12, bytes.as_mut_ptr()) };
    assert_eq!(done, 0);
    bytes.iter().map(|byte| byte & 1 == 1).collect()
}

proptest! {
    #[test]
    fn a_single_byte_anywhere_makes_a_page_non_zero(at in 0u64..4096, byte in 1u8..) {
        let memory = memory();
        memory.write_slice(&[byte], GuestAddress(0x3000 + at)).unwrap();
        prop_assert!(!is_zero_page(&memory, 0x3000).unwrap());
        prop_assert!(is_zero_page(&memory, 0x2000).unwrap() && is_zero_page(&memory, 0x4000).unwrap());
    }
}
