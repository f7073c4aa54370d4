//! Queues of a tap, opened for another program.
#![allow(unsafe_code)] // An ioctl, and `pre_exec`: the child keeps descriptors that no other process is to have.

use std::ffi::{c_int, c_short};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

/// Of `linux/if_tun.h`.
const TUNSETIFF: Opcode = opcode::write::<c_int>(b'T', 202);
const IFF_TAP: c_short = 0x0002;
const IFF_MULTI_QUEUE: c_short = 0x0100;
const IFF_NO_PI: c_short = 0x1000;
const IFF_VNET_HDR: c_short = 0x4000;

/// `struct ifreq` with flags.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: c_short,
    rest: [u8; 22],
}

/// Open queues of one tap.
pub struct TapQueues(Vec<File>);

impl TapQueues {
    /// Opens `count` queues of a tap in this thread's network that may have several.
    pub fn open(tap: &str, count: usize) -> Result<Self> {
        let queues = (0..count).map(|_| queue(tap));
        Ok(Self(queues.collect::<Result<_>>()?))
    }

    /// Their descriptors, as `[3,4]`.
    pub fn list(&self) -> String {
        format!("{:?}", self.0.iter().map(File::as_raw_fd).collect::<Vec<_>>()).replace(' ', "")
    }

    /// Leaves the queues to the program that `command` starts. This process and its other children do not keep them: the
    /// kernel would put packets into queues that no program reads.
    pub fn leave_to(self, command: &mut Command) {
        let keep = move || {
            for queue in &self.0 {
                fcntl_setfd(queue, FdFlags::empty())?;
            }
            Ok(())
        };
        // SAFETY: the closure runs between fork and exec and makes fcntl calls: no allocation, no lock.
        unsafe {
            command.pre_exec(keep);
        }
    }
}

fn queue(tap: &str) -> Result<File> {
    let mut request = InterfaceRequest {
        name: [0; 16],
        flags: IFF_TAP | IFF_MULTI_QUEUE | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    // The last byte stays the end of the name.
    ensure!(tap.len() < request.name.len(), "{tap}: too long a name");
    request.name[..tap.len()].copy_from_slice(tap.as_bytes());
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: the kernel reads one `ifreq`.
    unsafe { ioctl(&file, Setter::<TUNSETIFF, _>::new(request)) }
        .with_context(|| format!("a queue of {tap}"))?;
    Ok(file)
}
