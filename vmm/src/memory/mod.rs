//! Guest memory: its backing, its KVM slots, what of it was written, what of it is in use.

mod bitmap_log;
mod error;
mod mapping;
mod marks;
mod populated;
mod reserve;
mod ring;
mod ring_log;
mod slots;

pub use bitmap_log::BitmapLog;
pub use error::MemoryError;
pub use mapping::{adopt, check_size, create, files, is_shared, map_private, ranges};
pub use populated::{populated, private_copies};
pub use reserve::make_resident;
pub use ring_log::{RingLog, enable_rings};
pub use slots::{register, set_dirty_log};
