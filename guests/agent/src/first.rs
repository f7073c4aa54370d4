//! Being the first program of a guest that has no other.

use std::io;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

/// What the agent reads from, and of which file system.
const MOUNTS: [(&str, &str); 3] = [("/proc", "proc"), ("/dev", "devtmpfs"), ("/sys", "sysfs")];

/// Mounts what the agent needs if it is the first program; a stock guest's has done so already.
pub(crate) fn prepare() -> io::Result<()> {
    if std::process::id() != 1 {
        return Ok(());
    }
    for (point, kind) in MOUNTS {
        match mount(kind, point, kind, MountFlags::empty(), None) {
            // The kernel may mount /dev itself.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
