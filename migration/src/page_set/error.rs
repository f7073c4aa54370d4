//! Why something is not a set of guest pages.

/// Why something is not a set of guest pages, or does not fit into one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageSetError {
    /// A region is empty, not made of pages, or overlaps the one before it.
    #[error("region {gpa:#x}+{len:#x} is empty, not made of whole pages, out of order or too high")]
    Region {
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// Pages that are not in any region, or not in one alone.
    #[error("pages {gpa:#x}+{len:#x} are not within one region of guest RAM")]
    OutOfRange {
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// No such region.
    #[error("there is no region {index}: there are {count}")]
    NoRegion {
        /// The region that was asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// A bitmap has another size than its region, or bits past its end.
    #[error("bitmap of region {gpa:#x}: expected {expected} words with bits for {pages} pages, got {got} words{}",
        if *stray { " and bits past the end" } else { "" })]
    Bitmap {
        /// The region's first guest-physical address.
        gpa: u64,
        /// Pages of the region.
        pages: u64,
        /// Words of 64 bits that they take.
        expected: usize,
        /// Words that came.
        got: usize,
        /// Whether bits past the last page are set.
        stray: bool,
    },
    /// Two sets are over different regions.
    #[error("page sets are over different regions")]
    OtherRegions,
}
