//! What a page holds: a stamp of one cache line (page number, generation, checksum), which every sweep renews,
//! and a body that depends on the page number only, so that no page is zero, or like another, or compresses well.

use crate::memory::PAGE;

/// Words of a page.
pub const WORDS: usize = PAGE as usize / 8;

/// Words of the stamp at the start of the page: one cache line.
pub const STAMP_WORDS: usize = 8;

pub(crate) const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// What was found instead of the expected stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The page number in the stamp.
    pub page: u64,
    /// The generation in the stamp.
    pub generation: u64,
    /// Whether the stamp is whole.
    pub intact: bool,
}

/// The stamp of a page in a generation.
pub fn stamp(page: u64, generation: u64) -> [u64; STAMP_WORDS] {
    let sum = checksum(page, generation);
    [
        page,
        generation,
        sum,
        !page,
        !generation,
        sum ^ page,
        sum ^ generation,
        !sum,
    ]
}

/// Compares the head of a page with the stamp that belongs there.
pub fn check(head: &[u64; STAMP_WORDS], page: u64, generation: u64) -> Result<(), Seen> {
    if same(head, &stamp(page, generation)) {
        return Ok(());
    }
    Err(Seen {
        page: head[0],
        generation: head[1],
        intact: same(head, &stamp(head[0], head[1])),
    })
}

/// Writes the body, all but the stamp, of a page.
pub fn fill_body(page: u64, body: &mut [u64]) {
    let mut word = seed(page);
    for slot in body {
        *slot = word;
        word = word.wrapping_add(STEP);
    }
}

/// Whether a body is the one of this page.
pub fn body_intact(page: u64, body: &[u64]) -> bool {
    let mut word = seed(page);
    let mut difference = 0;
    for slot in body {
        difference |= *slot ^ word;
        word = word.wrapping_add(STEP);
    }
    difference == 0
}

/// Equality without a call of `bcmp`, which is slow in a freestanding image.
fn same(a: &[u64; STAMP_WORDS], b: &[u64; STAMP_WORDS]) -> bool {
    a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

fn checksum(page: u64, generation: u64) -> u64 {
    mix(mix(page ^ STEP).wrapping_add(generation))
}

fn seed(page: u64) -> u64 {
    mix(page.wrapping_add(1))
}

/// Every bit of the result depends on every bit of the word.
pub(crate) fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_fits_its_page_and_generation_only() {
        let head = stamp(7, 3);
        assert_eq!(check(&head, 7, 3), Ok(()));
        assert_eq!(
            check(&head, 7, 4),
            Err(Seen {
                page: 7,
                generation: 3,
                intact: true
            })
        );
        assert_eq!(
            check(&head, 8, 3),
            Err(Seen {
                page: 7,
                generation: 3,
                intact: true
            })
        );
        assert_eq!(
            check(&[0; STAMP_WORDS], 0, 0),
            Err(Seen {
                page: 0,
                generation: 0,
                intact: false
            })
        );
    }

    #[test]
    fn every_flipped_bit_of_a_stamp_is_seen() {
        for bit in 0..STAMP_WORDS * 64 {
            let mut head = stamp(7, 3);
            head[bit / 64] ^= 1 << (bit % 64);
            assert!(check(&head, 7, 3).is_err_and(|seen| !seen.intact), "bit {bit}");
        }
    }

    #[test]
    fn bodies_are_their_pages_own() {
        let mut body = [0; WORDS - STAMP_WORDS];
        fill_body(5, &mut body);
        assert!(body_intact(5, &body));
        assert!(!body_intact(6, &body));
        body[100] ^= 1 << 40;
        assert!(!body_intact(5, &body));
    }
}
