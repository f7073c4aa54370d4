//! Guest RAM as all crates know it, with marks for what the monitor's own devices wrote.

mod marks;

pub use marks::{PageMarks, zeroed_words};

/// Guest RAM. The marks say what the monitor's own devices wrote; what vCPUs write is KVM's to log.
pub type GuestMemory = vm_memory::GuestMemoryMmap<PageMarks>;

/// Bytes of a page: the unit of dirty logging and of migration.
pub const PAGE_SIZE: u64 = 4096;
