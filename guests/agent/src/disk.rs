//! The disk workload: files with a checksum, each fsynced, the last few kept, old ones read back from the device.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel};
use std::thread;
use std::time::Duration;

use guest_core::fill_body;
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use xxhash_rust::xxh3::xxh3_64;

use crate::report::AgentReport;

const MOUNT_POINT: &str = "/mnt";
const FILE_BYTES: usize = 256 << 10;
/// Direct reads need buffers aligned to the device's block.
const ALIGNMENT: usize = 4096;
const KEPT: u64 = 16;
/// Between two files: the disk is busy, the guest is not.
const NAP: Duration = Duration::from_millis(20);
/// After an I/O error.
const PENALTY: Duration = Duration::from_millis(250);

/// What the workload can be asked.
pub(crate) enum DiskWorkloadRequest {
    /// Verify all files; the answer is their number.
    Verify(SyncSender<u64>),
    /// Stop and unmount; the answer comes when that is done.
    Stop(SyncSender<()>),
}

/// Mounts the device and starts the workload; `None` if it cannot be mounted.
pub(crate) fn start(device: &str, report: Arc<AgentReport>) -> Option<Sender<DiskWorkloadRequest>> {
    if let Err(error) = mount(device, MOUNT_POINT, "ext4", MountFlags::NOATIME, None) {
        report.error(format_args!("disk={device} expected=mounted got={error:?}"));
        return None;
    }
    let (sender, requests) = channel();
    thread::spawn(move || {
        let answer = run(Path::new(MOUNT_POINT), &report, &requests);
        if let Err(error) = unmount(MOUNT_POINT, UnmountFlags::empty()) {
            report.error(format_args!("disk=unmount expected=done got={error:?}"));
        }
        if let Some(answer) = answer {
            let _ = answer.send(());
        }
    });
    Some(sender)
}

/// Works until it is asked to stop; returns where to answer.
fn run(
    folder: &Path,
    report: &AgentReport,
    requests: &Receiver<DiskWorkloadRequest>,
) -> Option<SyncSender<()>> {
    let mut files = WorkloadFiles {
        folder: folder.join("files"),
        first: 0,
        next: 0,
    };
    files.clear(report);
    let mut nap = Duration::ZERO;
    loop {
        match requests.recv_timeout(nap) {
            Ok(DiskWorkloadRequest::Verify(answer)) => drop(answer.send(files.verify(report))),
            Ok(DiskWorkloadRequest::Stop(answer)) => return Some(answer),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
        nap = if files.step(report) { NAP } else { PENALTY };
    }
}

/// Files `first..next` are on the disk.
struct WorkloadFiles {
    folder: PathBuf,
    first: u64,
    next: u64,
}

impl WorkloadFiles {
    /// Removes what an earlier boot left.
    fn clear(&mut self, report: &AgentReport) {
        let cleared = match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => fs::create_dir(&self.folder),
        };
        if let Err(error) = cleared {
            report.error(format_args!("file=- expected=cleared got={error}"));
        }
    }

    /// Writes a file, drops the oldest, reads an old one. False after an I/O error.
    fn step(&mut self, report: &AgentReport) -> bool {
        let number = self.next;
        if let Err(error) = write(&self.path(number), number) {
            report.error(format_args!("file={number} expected=written got={error}"));
            return false;
        }
        self.next += 1;
        report.files.fetch_add(1, Ordering::Relaxed);
        if self.next - self.first > KEPT {
            if let Err(error) = fs::remove_file(self.path(self.first)) {
                report.error(format_args!("file={} expected=removed got={error}", self.first));
            }
            self.first += 1;
        }
        // Any of the kept ones in turn; a step that shares no factor with their number.
        let old = self.first + (number * 7) % (self.next - self.first);
        self.check(old, report)
    }

    fn verify(&self, report: &AgentReport) -> u64 {
        for number in self.first..self.next {
            self.check(number, report);
        }
        self.next - self.first
    }

    fn check(&self, number: u64, report: &AgentReport) -> bool {
        match read(&self.path(number)) {
            Ok(content) => match damage(number, &content) {
                None => true,
                Some(what) => {
                    report.error(format_args!("file={number} {what}"));
                    false
                }
            },
            Err(error) => {
                report.error(format_args!("file={number} expected=read got={error}"));
                false
            }
        }
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(number.to_string())
    }
}

/// Header (number, length, xxh3 of the body: 8 bytes each, little endian), then the body.
const HEADER: usize = 24;

fn content(number: u64) -> Vec<u8> {
    let mut words = vec![0; (FILE_BYTES - HEADER) / 8];
    fill_body(number, &mut words);
    let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let header = [number, FILE_BYTES as u64, xxh3_64(&body)];
    let mut content: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    content.extend(body);
    content
}

/// What is wrong with a file's content.
fn damage(number: u64, content: &[u8]) -> Option<String> {
    let word = |at: usize| {
        content
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .map(|word| u64::from_le_bytes(*word))
    };
    let expected = [
        Some(number),
        Some(content.len() as u64),
        content.get(HEADER..).map(xxh3_64),
    ];
    let got = [word(0), word(8), word(16)];
    let names = ["number", "length", "checksum"];
    let wrong = (0..names.len()).find(|at| expected[*at] != got[*at] || got[*at].is_none())?;
    let show = |value: Option<u64>| value.map_or("nothing".to_owned(), |value| format!("{value:#x}"));
    Some(format!(
        "field={} expected={} got={}",
        names[wrong],
        show(expected[wrong]),
        show(got[wrong])
    ))
}

fn write(path: &Path, number: u64) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(&content(number))?;
    file.sync_all()
}

/// Reads a file past the page cache where the file system can.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(path);
    let mut file = match direct {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => File::open(path)?,
        other => other?,
    };
    let mut buffer = vec![0; FILE_BYTES + ALIGNMENT];
    let start = buffer.as_ptr().align_offset(ALIGNMENT);
    let mut len = 0;
    while len < FILE_BYTES {
        match file.read(&mut buffer[start + len..start + FILE_BYTES])? {
            0 => break,
            n => len += n,
        }
    }
    Ok(buffer[start..start + len].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_rotate_and_verify() {
        let folder = tempfile::tempdir().unwrap();
        let report = AgentReport::default();
        let mut files = WorkloadFiles {
            folder: folder.path().join("files"),
            first: 0,
            next: 0,
        };
        files.clear(&report);
        for _ in 0..20 {
            assert!(files.step(&report));
        }
        assert_eq!(fs::read_dir(&files.folder).unwrap().count() as u64, KEPT);
        assert_eq!((files.verify(&report), report.errors()), (KEPT, 0));
    }

    #[test]
    fn damage_and_loss_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let report = AgentReport::default();
        let mut files = WorkloadFiles {
            folder: folder.path().join("files"),
            first: 0,
            next: 0,
        };
        files.clear(&report);
        for _ in 0..4 {
            files.step(&report);
        }
        let mut broken = content(0);
        broken[5000] ^= 1;
        fs::write(files.path(0), broken).unwrap();
        fs::write(files.path(1), content(9)).unwrap();
        fs::write(files.path(2), &content(2)[..1000]).unwrap();
        fs::remove_file(files.path(3)).unwrap();
        files.verify(&report);
        assert_eq!(report.errors(), 4);
        assert!(damage(0, &[]).is_some());
    }
}
