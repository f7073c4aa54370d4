//! Guest memory: its backing, its KVM slots, what of it was written, what of it is in use.

mod available;
mod bitmap_log;
mod error;
mod fault_handler;
mod huge_pages;
mod mapping;
mod marks;
mod populated;
mod reserve;
mod ring;
mod ring_log;
mod slots;
mod userfault;
mod watched;

pub use bitmap_log::BitmapLog;
pub use error::MemoryError;
pub use fault_handler::FaultHandler;
pub use mapping::{
    MIN_MEMORY, adopt, check_room, check_size, create, files, kind, map_private, ranges, unmerge,
};
pub use marks::RamRegion;
pub use populated::{ProtectedPages, check_whole, open_page_map, populated, private_copies};
pub use reserve::make_resident;
pub use ring_log::{RingLog, enable_rings};
pub use slots::{register, set_dirty_log};
pub use userfault::{Filled, Userfault, UserfaultEvent};
pub use watched::{WatchedMemory, is_guest_memory};

pub use migration_io::PAGE_SIZE;
