//! A disk in memory, at either side.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, mpsc};

use crate::*;

/// What the machine's only device is called and has. Its last page is not whole.
pub(super) const SIZE: u64 = 700 * PAGE_SIZE + 512;

/// Its mark.
pub(super) const MARK: DiskMark = DiskMark {
    device: 0,
    offset: 1 << 40,
};

/// A disk, and while it is mirrored the log of what is written to it.
#[derive(Default)]
pub(super) struct FakeDisk {
    content: Mutex<Vec<u8>>,
    marks: Mutex<Option<Vec<u64>>>,
    /// Makes the next read fail.
    pub(super) broken: AtomicBool,
    /// What a write waits for, as on a server that is gone: until its other end is dropped.
    pub(super) hang: Mutex<Option<mpsc::Receiver<()>>>,
    /// Keeps who reads, as a dead file server would.
    hung: Mutex<bool>,
    answers: Condvar,
    /// Reads so far.
    pub(super) reads: AtomicU64,
}

impl FakeDisk {
    /// All zero.
    pub(super) fn new() -> Self {
        Self {
            content: Mutex::new(vec![0; SIZE as usize]),
            ..Self::default()
        }
    }

    /// Writes as a device does: marked afterwards.
    pub(super) fn write_and_mark(&self, offset: u64, content: &[u8]) {
        self.put(offset, content);
        if let Some(marks) = &mut *self.marks.lock().unwrap() {
            for block in offset / PAGE_SIZE..=(offset + content.len() as u64 - 1) / PAGE_SIZE {
                marks[block as usize / 64] |= 1 << (block % 64);
            }
        }
    }

    pub(super) fn log(&self, on: bool) {
        let words = SIZE.div_ceil(PAGE_SIZE).div_ceil(64) as usize;
        *self.marks.lock().unwrap() = on.then(|| vec![0; words]);
    }

    pub(super) fn is_logged(&self) -> bool {
        self.marks.lock().unwrap().is_some()
    }

    pub(super) fn content(&self) -> Vec<u8> {
        self.content.lock().unwrap().clone()
    }

    /// From now on reads hang, or no longer do.
    pub(super) fn hang_reads(&self, hung: bool) {
        *self.hung.lock().unwrap() = hung;
        self.answers.notify_all();
    }

    fn put(&self, offset: u64, content: &[u8]) {
        self.content.lock().unwrap()[offset as usize..][..content.len()].copy_from_slice(content);
    }
}

impl SourceDisk for FakeDisk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn allocated(&self) -> Result<Vec<(u64, u64)>, PortError> {
        let content = self.content();
        let blocks = content.chunks(PAGE_SIZE as usize).enumerate();
        let used = blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0));
        Ok(used
            .map(|(at, block)| (at as u64 * PAGE_SIZE, block.len() as u64))
            .collect())
    }

    fn marked(&self) -> Vec<u64> {
        self.marks.lock().unwrap().clone().unwrap()
    }

    fn clear(&self, first: u64, words: &[u64]) {
        let mut marks = self.marks.lock().unwrap();
        let marks = marks.as_mut().unwrap();
        for (mark, word) in marks[first as usize / 64..].iter_mut().zip(words) {
            *mark &= !word;
        }
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let hung = self.hung.lock().unwrap();
        drop(self.answers.wait_while(hung, |hung| *hung).unwrap());
        if self.broken.load(Ordering::SeqCst) {
            return Err("injected into read".into());
        }
        into.copy_from_slice(&self.content.lock().unwrap()[offset as usize..][..into.len()]);
        Ok(())
    }
}

impl BlankDisk for FakeDisk {
    fn device(&self) -> u32 {
        0
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn write(&self, offset: u64, content: &[u8]) -> Result<(), PortError> {
        if self.broken.load(Ordering::SeqCst) {
            return Err("injected into write".into());
        }
        if let Some(gone) = &*self.hang.lock().unwrap() {
            let _ = gone.recv();
        }
        self.put(offset, content);
        Ok(())
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError> {
        SourceDisk::read(self, offset, into)
    }

    fn zero(&self, offset: u64, len: u64) -> Result<(), PortError> {
        self.put(offset, &vec![0; len as usize]);
        Ok(())
    }
}

/// The device that the disk is behind.
pub(super) fn device() -> DeviceDescription {
    DeviceDescription {
        id: "disk".into(),
        kind: "fake-disk".into(),
        version: 1,
        features: 0,
        backend_size: SIZE,
        read_only: false,
        parameters: Vec::new(),
    }
}
