//! Memory of our own, aligned for direct I/O: for what the kernel cannot move from or to the guest's.

/// More than any disk asks for.
const ALIGNMENT: usize = 4096;
/// Most bytes of it: what is longer goes in parts, each of them whole blocks.
const MOST: u64 = 64 << 10;

/// Zeroes at first.
pub(super) struct Scratch {
    bytes: Vec<u8>,
    begin: usize,
}

impl Scratch {
    /// For so many bytes in all.
    pub(super) fn new(len: u64) -> Self {
        let bytes = vec![0; len.min(MOST) as usize + ALIGNMENT];
        let begin = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { bytes, begin }
    }

    /// For the next part of so many bytes, or for all of them.
    pub(super) fn part(&mut self, len: u64) -> &mut [u8] {
        let most = (self.bytes.len() - ALIGNMENT) as u64;
        &mut self.bytes[self.begin..][..len.min(most) as usize]
    }
}
