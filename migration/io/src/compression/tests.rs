//! Pages through compression and back, and blocks that a hostile peer would send.

use proptest::prelude::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::{GuestMemory, MemoryIoError};

const LEN: u64 = 2 << 20;
const METHODS: [Method; 2] = [Method::Lz4, Method::Zstd];

fn memory(byte: impl FnMut(usize) -> u8) -> GuestMemory {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), LEN as usize)]).unwrap();
    let bytes: Vec<u8> = (0..LEN as usize).map(byte).collect();
    memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    clean(&memory);
    memory
}

fn clean(memory: &GuestMemory) {
    memory
        .iter()
        .for_each(|region| region.get_mmap().bitmap().clear_all());
}

fn text() -> GuestMemory {
    memory(|at| {
        if at % 16 < 12 {
            (at >> 8) as u8
        } else {
            (at * at) as u8
        }
    })
}

fn noise() -> GuestMemory {
    let mut state = 1u64;
    memory(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
}

fn range(gpa: u64, len: u64) -> MemoryRange {
    MemoryRange { gpa, len }
}

fn content(memory: &GuestMemory, range: MemoryRange) -> Vec<u8> {
    let mut bytes = vec![0; range.len as usize];
    memory.read_slice(&mut bytes, GuestAddress(range.gpa)).unwrap();
    bytes
}

fn scattered() -> Vec<MemoryRange> {
    (0..128).map(|number| range(number * 0x3000, 0x2000)).collect()
}

#[test]
fn scattered_pages_come_back_in_place_unmarked_with_both_methods_again_and_again() {
    let (from, to) = (text(), memory(|_| 9));
    let mut decompressor = Decompressor::new().unwrap();
    for method in METHODS {
        let mut compressor = Compressor::new(method).unwrap();
        for ranges in [scattered(), vec![range(0x1000, 0x1000)], scattered()] {
            let block = compressor.compress(&from, &ranges).unwrap().unwrap();
            let all: u64 = ranges.iter().map(|range| range.len).sum();
            assert!((block.len() as u64) < all * 85 / 100);
            decompressor.decompress(method, block, &to, &ranges).unwrap();
            for range in ranges {
                assert!(
                    content(&from, range) == content(&to, range),
                    "{method:?} {range:?}"
                );
            }
        }
    }
    assert!(content(&to, range(0x2000, 0x1000)).iter().all(|byte| *byte == 9));
    let region = to.iter().next().unwrap();
    assert!(
        (0..LEN as usize)
            .step_by(4096)
            .all(|at| !region.bitmap().dirty_at(at))
    );
}

#[test]
fn noise_does_not_pay() {
    let memory = noise();
    for method in METHODS {
        let mut compressor = Compressor::new(method).unwrap();
        assert!(compressor.compress(&memory, &scattered()).unwrap().is_none());
        assert!(compressor.compress(&memory, &[]).unwrap().is_none());
    }
}

#[test]
fn more_than_a_block_and_memory_that_is_not_there_are_refused() {
    let memory = text();
    let most = MAX_BLOCK as u64;
    let mut decompressor = Decompressor::new().unwrap();
    for method in METHODS {
        let mut compressor = Compressor::new(method).unwrap();
        assert!(
            compressor
                .compress(&memory, &[range(4096, most)])
                .unwrap()
                .is_some()
        );
        for ranges in [
            vec![range(0, most + 1)],
            vec![range(0, most), range(0, 1)],
            vec![range(0, u64::MAX); 3],
        ] {
            let error = compressor.compress(&memory, &ranges).unwrap_err();
            assert!(matches!(error, CompressionError::TooLarge { .. }), "{error}");
            let error = decompressor
                .decompress(method, &[0; 99], &memory, &ranges)
                .unwrap_err();
            assert!(matches!(error, CompressionError::TooLarge { .. }), "{error}");
        }
        let outside = [range(0, 4096), range(LEN - 4096, 8192)];
        let error = compressor.compress(&memory, &outside).unwrap_err();
        assert!(
            matches!(error, CompressionError::Memory(MemoryIoError::OutOfBounds { .. })),
            "{error}"
        );
        let block = compressor
            .compress(&memory, &[range(0x5000, 12288)])
            .unwrap()
            .unwrap();
        let before = content(&memory, range(0, 4096));
        let error = decompressor
            .decompress(method, block, &memory, &outside)
            .unwrap_err();
        assert!(matches!(error, CompressionError::Memory(_)), "{error}");
        assert!(content(&memory, range(0, 4096)) == before, "nothing was written");
    }
}

#[test]
fn a_block_of_another_length_is_refused_and_writes_nothing() {
    let (from, to) = (text(), memory(|_| 9));
    let mut decompressor = Decompressor::new().unwrap();
    for method in METHODS {
        let mut compressor = Compressor::new(method).unwrap();
        let block = compressor.compress(&from, &[range(0, 8192)]).unwrap().unwrap();
        for len in [4096, 8191] {
            let error = decompressor
                .decompress(method, block, &to, &[range(0, len)])
                .unwrap_err();
            let bad = matches!(
                error,
                CompressionError::BadLz4 { .. } | CompressionError::BadZstd { .. }
            );
            assert!(bad, "{error}");
        }
        let longer = [range(0, 8193)];
        let error = decompressor.decompress(method, block, &to, &longer).unwrap_err();
        assert!(
            matches!(
                error,
                CompressionError::Length {
                    expected: 8193,
                    got: 8192
                }
            ),
            "{error}"
        );
    }
    assert!(content(&to, range(0, LEN)).iter().all(|byte| *byte == 9));
}

#[test]
fn attempts_get_rarer_with_every_failure_and_come_back_with_a_success() {
    let mut chooser = Chooser::default();
    let mut attempts = Vec::new();
    for batch in 0..400 {
        if chooser.attempt() {
            attempts.push(batch);
            chooser.learn(batch == 0);
        }
    }
    assert_eq!(attempts, [0, 1, 3, 6, 11, 20, 37, 70, 135, 200, 265, 330, 395]);
    chooser.learn(true);
    assert!((0..10).all(|_| chooser.attempt()));
}

proptest! {
    #[test]
    fn hostile_blocks_neither_panic_nor_pass_when_cut(
        noise in prop::collection::vec(any::<u8>(), 0..600),
        cut in 1usize..4000,
        flip in 0usize..40000,
    ) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 8192)]).unwrap();
        let source: Vec<u8> = (0..8192u32).map(|at| (at / 5 * at) as u8 & 0x3f).collect();
        memory.write_slice(&source, GuestAddress(0)).unwrap();
        let ranges = [range(0, 8192)];
        let mut decompressor = Decompressor::new().unwrap();
        for method in METHODS {
            let mut compressor = Compressor::new(method).unwrap();
            let mut block = compressor.compress(&memory, &ranges).unwrap().unwrap().to_vec();
            let end = block.len().saturating_sub(cut);
            prop_assert!(decompressor.decompress(method, &block[..end], &memory, &ranges).is_err());
            // These may be blocks by chance: then they fill the pages.
            _ = decompressor.decompress(method, &noise, &memory, &ranges);
            let at = flip / 8 % block.len();
            block[at] ^= 1 << (flip % 8);
            _ = decompressor.decompress(method, &block, &memory, &ranges);
            block[at] ^= 1 << (flip % 8);
            decompressor.decompress(method, &block, &memory, &ranges).unwrap();
            prop_assert!(content(&memory, ranges[0]) == source, "the decompressor is as good as new");
        }
    }
}
