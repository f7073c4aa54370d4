//! A file system of one file, whose reads, writes and flushes take as long as a test wants, and of which one may fail (FUSE).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// What is asked for (linux/fuse.h).
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
pub(super) const WRITE: u32 = 16;
pub(super) const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const DESTROY: u32 = 38;

const REQUEST_HEADER: usize = 40;
/// What a server's buffer must have room for: a write, and what belongs to it.
const BUFFER: usize = (1 << 20) + (64 << 10);
const MAX_WRITTEN: u32 = 1 << 20;

/// A file that is mounted while this value lives.
pub(super) struct SlowFile {
    path: std::path::PathBuf,
    held: Arc<(Mutex<HeldRequests>, Condvar)>,
}

impl SlowFile {
    /// A file of so many bytes at `path`.
    pub(super) fn new(path: &Path, size: u64) -> Self {
        File::create(path).unwrap();
        let fuse = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let fd = fuse.as_raw_fd();
        let data = format!("fd={fd},rootmode=100000,user_id=0,group_id=0");
        let data = std::ffi::CString::new(data).unwrap();
        mount("slow", path, "fuse", MountFlags::empty(), data.as_c_str()).unwrap();
        let held: Arc<(Mutex<HeldRequests>, Condvar)> = Arc::default();
        let server = FuseServer {
            fuse,
            size,
            content: vec![0; size as usize],
            held: held.clone(),
        };
        std::thread::spawn(move || server.serve());
        Self {
            path: path.to_owned(),
            held,
        }
    }

    /// From now on nothing is read, written or flushed.
    pub(super) fn hold(&self) {
        self.held.0.lock().unwrap().is_held = true;
    }

    /// Waits until something has come that is held.
    pub(super) fn wait_held(&self) {
        let held = self.held.0.lock().unwrap();
        let time = Duration::from_secs(10);
        let waited = self.held.1.wait_timeout_while(held, time, |held| !held.has_come);
        assert!(!waited.unwrap().1.timed_out(), "nothing has come");
    }

    /// Whether something has come that is held.
    pub(super) fn holds(&self) -> bool {
        self.held.0.lock().unwrap().has_come
    }

    /// The next request of this kind fails.
    pub(super) fn fail(&self, kind: u32) {
        self.held.0.lock().unwrap().fails = Some(kind);
    }

    /// Lets the held requests and all later ones be done.
    pub(super) fn release(&self) {
        self.held.0.lock().unwrap().is_held = false;
        self.held.1.notify_all();
    }
}

#[derive(Default)]
struct HeldRequests {
    is_held: bool,
    /// Something waits for the end of it.
    has_come: bool,
    /// What fails the next time.
    fails: Option<u32>,
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        self.release();
        // The mount goes once the last handle of the file is closed.
        unmount(&self.path, UnmountFlags::DETACH).unwrap();
    }
}

struct FuseServer {
    fuse: File,
    size: u64,
    content: Vec<u8>,
    held: Arc<(Mutex<HeldRequests>, Condvar)>,
}

impl FuseServer {
    fn serve(mut self) {
        let mut request = vec![0; BUFFER];
        // Until it is unmounted.
        while let Ok(len) = self.fuse.read(&mut request) {
            let number = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
            let (kind, unique) = (number(4), &request[8..16]);
            if [READ, WRITE, FSYNC].contains(&kind) {
                let mut held = self.held.0.lock().unwrap();
                held.has_come = true;
                self.held.1.notify_all();
                held = self.held.1.wait_while(held, |held| held.is_held).unwrap();
                held.has_come = false;
            }
            let fails = self
                .held
                .0
                .lock()
                .unwrap()
                .fails
                .take_if(|fails| *fails == kind)
                .is_some();
            if kind == FORGET {
                continue;
            }
            let answer = Self::answer(self.size, &mut self.content, kind, &request[REQUEST_HEADER..len]);
            let (error, body) = match answer {
                _ if fails => (-libc::EIO, Vec::new()),
                Some(body) => (0, body),
                None => (-libc::ENOSYS, Vec::new()),
            };
            let len = 16 + body.len() as u32;
            let head = [&len.to_le_bytes()[..], &error.to_le_bytes(), unique].concat();
            // The asking process may have been killed.
            let _ = self.fuse.write(&[head, body].concat());
        }
    }

    fn answer(size: u64, content: &mut [u8], kind: u32, request: &[u8]) -> Option<Vec<u8>> {
        let number = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().unwrap());
        let place = || {
            let (offset, len) = (number(8) as usize, number(16) as u32 as usize);
            offset.min(size as usize)..(offset + len).min(size as usize)
        };
        Some(match kind {
            INIT => {
                // Version, read-ahead, large writes, requests in the background.
                let mut body: Vec<u8> = [7, 31, 0, 1 << 5, 64 << 16 | 64, MAX_WRITTEN, 1, 256]
                    .into_iter()
                    .flat_map(u32::to_le_bytes)
                    .collect();
                body.resize(64, 0);
                body
            }
            GETATTR => {
                let mut body = [3600u64, 0, 1, size, size / 512].map(u64::to_le_bytes).concat();
                body.resize(16 + 60, 0);
                // Mode, links, owner and group, device, block size, flags.
                let rest = [0o100_600u32, 1, 0, 0, 0, 4096, 0];
                body.extend(rest.into_iter().flat_map(u32::to_le_bytes));
                body
            }
            // Nothing of it is cached.
            OPEN => [1u64, 1].map(u64::to_le_bytes).concat(),
            READ => content[place()].to_vec(),
            WRITE => {
                let place = place();
                let len = place.len();
                content[place].copy_from_slice(&request[40..40 + len]);
                (len as u64).to_le_bytes().to_vec()
            }
            FSYNC | FLUSH | RELEASE | DESTROY => Vec::new(),
            _ => return None,
        })
    }
}
