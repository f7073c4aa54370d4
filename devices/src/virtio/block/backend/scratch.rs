//! A buffer that is aligned for direct I/O, for data that the kernel cannot move from or to guest memory itself.

/// The buffer's alignment in bytes: no disk demands more for direct I/O.
const ALIGNMENT: usize = 4096;
/// The most bytes of a buffer: longer transfers go in parts of whole blocks.
const MAX_LEN: u64 = 64 << 10;

/// The buffer; zeroes at first.
pub(super) struct Scratch {
    bytes: Vec<u8>,
    /// The index of the first aligned byte.
    begin: usize,
}

impl Scratch {
    /// A buffer for a transfer of `len` bytes.
    pub(super) fn new(len: u64) -> Self {
        let bytes = vec![0; len.min(MAX_LEN) as usize + ALIGNMENT];
        let begin = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { bytes, begin }
    }

    /// The buffer for the next part of a transfer with `len` bytes left.
    pub(super) fn part(&mut self, len: u64) -> &mut [u8] {
        let most = (self.bytes.len() - ALIGNMENT) as u64;
        &mut self.bytes[self.begin..][..len.min(most) as usize]
    }
}
