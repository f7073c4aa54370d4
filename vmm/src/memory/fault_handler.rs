//! Guest memory whose pages another process brings when they are needed, by Firecracker's protocol
//! (docs/snapshotting/handling-page-faults-on-snapshot-resume.md there).
//!
//! ```text
//!  this process                                     the handler
//!  memory without pages, registered ── userfaultfd and mappings ──▶ listens at a Unix socket
//!  a vCPU, a device, a stream touches a page ── page fault ───────▶ copies it from the snapshot's memory file
//!  the balloon gives pages up ── remove ──────────────────────────▶ they are zeroes from now on
//!  the machine cannot go on ◀── hangs up ── ends
//! ```
//!
//! The descriptor is kept here as well: were the handler's the last one, its end would turn pages that never came into
//! zeroes. So a thread that needs such a page waits, and for ever if the handler has ended.

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::GuestMemory;
use migration::MemoryKind;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;
use threads::{Role, Thread};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::huge_pages::HUGE_PAGE;
use super::{MemoryError, Userfault, kind};
use crate::memory::PAGE_SIZE;

/// The connection to the process that brings the pages, as long as it is needed.
#[derive(Debug)]
pub struct FaultHandler {
    stream: UnixStream,
    /// Whether this process ends the connection.
    ended: Arc<AtomicBool>,
    /// The thread that waits for the handler's end.
    watcher: Option<Thread>,
    _descriptor: Userfault,
}

/// Where a region of guest memory is here, and its content in the memory file.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct FaultMapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    /// In bytes.
    page_size: u64,
    /// In bytes as well, for handlers that know no other name.
    page_size_kib: u64,
}

impl FaultHandler {
    /// Hands the faults of `memory`, no page of which may be there yet, to the process that listens at `path`.
    /// `on_gone` is called once, on a thread of its own, if that process closes the connection.
    pub fn connect(
        path: &Path,
        memory: &GuestMemory,
        on_gone: impl FnOnce() + Send + 'static,
    ) -> Result<Self, MemoryError> {
        if kind(memory) == MemoryKind::Shared {
            return Err(MemoryError::SharedFaults);
        }
        let failed = |source| MemoryError::FaultHandler {
            path: path.into(),
            source,
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        let descriptor = Userfault::register(memory)?;
        send(&stream, &mappings(memory), &descriptor).map_err(failed)?;
        let ended = Arc::new(AtomicBool::new(false));
        let watched = (stream.try_clone().map_err(failed)?, ended.clone());
        let watcher = threads::spawn(Role::FaultHandler, "fault handler", move || {
            wait_end(watched.0);
            if !watched.1.load(Ordering::Acquire) {
                on_gone();
            }
        })
        .map_err(MemoryError::Thread)?;
        Ok(Self {
            stream,
            ended,
            watcher: Some(watcher),
            _descriptor: descriptor,
        })
    }
}

impl Drop for FaultHandler {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        // Fails only where the handler has hung up before.
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(watcher) = self.watcher.take() {
            // A panic in it has been reported by the panic hook.
            let _ = watcher.join();
        }
    }
}

/// The mappings of all regions, in the order in which a snapshot's memory file has them.
fn mappings(memory: &GuestMemory) -> Vec<FaultMapping> {
    let page_size = if kind(memory) == MemoryKind::HugePages {
        HUGE_PAGE
    } else {
        PAGE_SIZE
    };
    let mut offset = 0;
    memory
        .iter()
        .map(|region| {
            let mapping = FaultMapping {
                base_host_virt_addr: region.as_ptr() as u64,
                size: region.len(),
                offset,
                page_size,
                page_size_kib: page_size,
            };
            offset += region.len();
            mapping
        })
        .collect()
}

/// Sends the mappings and the descriptor in one message, as a handler reads them with one call.
fn send(stream: &UnixStream, mappings: &[FaultMapping], descriptor: &Userfault) -> io::Result<()> {
    let text = serde_json::to_vec(mappings)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for the descriptor"));
    }
    let sent = sendmsg(stream, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == text.len() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "expected to send {} bytes, sent {sent}",
        text.len()
    )))
}

/// Waits until the handler closes the connection. A handler sends nothing; what it sends all the same is dropped.
fn wait_end(mut stream: UnixStream) {
    let mut bytes = [0; 64];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
