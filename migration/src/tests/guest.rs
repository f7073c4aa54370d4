//! TestGuest memory with a thread in the place of vCPUs.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use migration_state::Record;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use serde::{Deserialize, Serialize};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::disk::{FakeDisk, SIZE};
use crate::{GuestMemory, PAGE_SIZE, PortError};

/// First address of the second region.
pub(super) const HIGH: u64 = 4 << 30;

/// In the place of a generation: whatever the page holds.
const ANY: u64 = u64::MAX;

/// Memory, and a thread that writes it unless the guest is paused.
pub(super) struct TestGuest {
    pub(super) memory: GuestMemory,
    shared: Arc<GuestShared>,
    thread: Option<JoinHandle<()>>,
}

struct GuestShared {
    /// What the thread writes as well.
    disk: OnceLock<Arc<FakeDisk>>,
    state: Mutex<GuestState>,
    changed: Condvar,
}

/// What is saved and restored, besides memory: the vCPUs' registers, so to speak.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Registers {
    /// Writes so far.
    pub(super) generation: u64,
    /// Generation of each page that was written; 0 means zeroed, [`ANY`] that it does not matter.
    pub(super) stamps: Vec<(u64, u64)>,
}

impl Record for Registers {
    const KIND: &'static str = "fake-registers";
    const VERSION: u16 = 1;
}

#[derive(Default)]
struct GuestState {
    held: bool,
    inside: bool,
    stop: bool,
    generation: u64,
    stamps: HashMap<u64, u64>,
    share: f64,
}

/// How the thread uses memory.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Load {
    /// Pages from which it writes one at random at a time; 0 means an idle guest that only counts.
    pub(super) pages: u64,
}

impl TestGuest {
    /// A machine of `low` pages at 0 and `high` at 4 GiB, held.
    pub(super) fn new(low: u64, high: u64) -> Self {
        let ranges = [
            (GuestAddress(0), (low * PAGE_SIZE) as usize),
            (GuestAddress(HIGH), (high * PAGE_SIZE) as usize),
        ];
        Self::with_memory(GuestMemory::from_ranges(&ranges).unwrap())
    }

    /// The same over files, and those files.
    pub(super) fn shared(low: u64, high: u64) -> (Self, Vec<OwnedFd>) {
        let file = |pages: u64| {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let file = memfd_create("fake-guest", flags).unwrap();
            ftruncate(&file, pages * PAGE_SIZE).unwrap();
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).unwrap();
            file
        };
        let files = vec![file(low), file(high)];
        let clones = files.iter().map(|file| file.try_clone().unwrap()).collect();
        (Self::over(low, high, clones).unwrap(), files)
    }

    /// The same over files that came from somewhere.
    pub(super) fn over(low: u64, high: u64, files: Vec<OwnedFd>) -> Result<Self, PortError> {
        let [low_file, high_file]: [OwnedFd; 2] = files.try_into().map_err(|_| "expected two files")?;
        let range = |gpa, pages: u64, file: OwnedFd| {
            let file = FileOffset::new(file.into(), 0);
            (GuestAddress(gpa), (pages * PAGE_SIZE) as usize, Some(file))
        };
        let ranges = [range(0, low, low_file), range(HIGH, high, high_file)];
        Ok(Self::with_memory(GuestMemory::from_ranges_with_files(&ranges)?))
    }

    fn with_memory(memory: GuestMemory) -> Self {
        let state = GuestState {
            held: true,
            ..GuestState::default()
        };
        let shared = Arc::new(GuestShared {
            disk: OnceLock::new(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        Self {
            memory,
            shared,
            thread: None,
        }
    }

    /// From now on the guest writes to a disk as well.
    pub(super) fn writes_to(&self, disk: Arc<FakeDisk>) {
        self.shared.disk.get_or_init(|| disk);
    }

    pub(super) fn start(&mut self, load: Load) {
        let (memory, shared) = (self.memory.clone(), self.shared.clone());
        self.release();
        self.thread = Some(thread::spawn(move || run(&memory, &shared, load)));
    }

    /// Writes one page, as the guest would.
    pub(super) fn write(&self, gpa: u64, zero: bool) {
        write(&self.memory, &mut self.shared.state.lock().unwrap(), gpa, zero);
    }

    /// What a page that was written holds is of no use any more.
    pub(super) fn forget(&self, gpa: u64) {
        if let Some(stamp) = self.shared.state.lock().unwrap().stamps.get_mut(&gpa) {
            *stamp = ANY;
        }
    }

    /// Pages that hold what is of use.
    pub(super) fn used(&self) -> usize {
        let state = self.shared.state.lock().unwrap();
        state.stamps.values().filter(|stamp| **stamp != ANY).count()
    }

    /// Every page that was ever written.
    pub(super) fn touched(&self) -> Vec<u64> {
        self.shared.state.lock().unwrap().stamps.keys().copied().collect()
    }

    /// Slows the thread down by this share of its time.
    pub(super) fn throttle(&self, share: f64) {
        self.shared.state.lock().unwrap().share = share;
    }

    pub(super) fn hold(&self) {
        let mut state = self.shared.state.lock().unwrap();
        state.held = true;
        while state.inside {
            state = self.shared.changed.wait(state).unwrap();
        }
    }

    pub(super) fn release(&self) {
        self.shared.state.lock().unwrap().held = false;
        self.shared.changed.notify_all();
    }

    pub(super) fn is_held(&self) -> bool {
        self.shared.state.lock().unwrap().held
    }

    /// Returns once the guest has made progress from here on.
    pub(super) fn await_progress(&self) {
        self.shared.await_progress();
    }

    pub(super) fn registers(&self) -> Registers {
        let state = self.shared.state.lock().unwrap();
        let mut stamps: Vec<_> = state.stamps.iter().map(|(gpa, stamp)| (*gpa, *stamp)).collect();
        stamps.sort_unstable();
        Registers {
            generation: state.generation,
            stamps,
        }
    }

    pub(super) fn load(&self, registers: Registers) {
        let mut state = self.shared.state.lock().unwrap();
        state.generation = registers.generation;
        state.stamps = registers.stamps.into_iter().collect();
    }

    /// Asserts that every page holds what its last write left there. The guest must be held.
    pub(super) fn check_stamps(&self) {
        assert!(self.is_held());
        let stamps: HashMap<u64, u64> = self.registers().stamps.into_iter().collect();
        for region in self.memory.iter() {
            for gpa in (region.start_addr().0..)
                .take(region.len() as usize)
                .step_by(PAGE_SIZE as usize)
            {
                let stamp = stamps.get(&gpa).copied().unwrap_or(0);
                if stamp == ANY {
                    continue;
                }
                let page: [u64; 512] = std::array::from_fn(|at| {
                    self.memory.read_obj(GuestAddress(gpa + at as u64 * 8)).unwrap()
                });
                assert_eq!(page, content(gpa, stamp), "page {gpa:#x}");
            }
        }
    }

    /// As KVM's log starts: with everything marked.
    pub(super) fn mark_all_dirty(&self) {
        for region in self.memory.iter() {
            region.get_mmap().bitmap().mark_dirty(0, region.len() as usize);
        }
    }
}

/// Another hold on a guest.
pub(super) struct GuestHold {
    memory: GuestMemory,
    shared: Arc<GuestShared>,
}

impl TestGuest {
    /// A hold on it for another thread.
    pub(super) fn writer(&self) -> GuestHold {
        GuestHold {
            memory: self.memory.clone(),
            shared: self.shared.clone(),
        }
    }
}

impl GuestHold {
    /// Writes the first so many pages, as the guest would.
    pub(super) fn write_all(&self, pages: u64) {
        let mut state = self.shared.state.lock().unwrap();
        for page in 0..pages {
            write(&self.memory, &mut state, page * PAGE_SIZE, false);
        }
    }

    /// Returns once the guest has made progress from here on.
    pub(super) fn await_progress(&self) {
        self.shared.await_progress();
    }
}

impl GuestShared {
    fn await_progress(&self) {
        let mut state = self.state.lock().unwrap();
        let from = state.generation;
        while state.generation == from {
            let (next, waited) = self.changed.wait_timeout(state, Duration::from_secs(10)).unwrap();
            assert!(!waited.timed_out(), "the guest does not run");
            state = next;
        }
    }
}

impl Drop for TestGuest {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn run(memory: &GuestMemory, shared: &GuestShared, load: Load) {
    let gpas: Vec<u64> = memory
        .iter()
        .flat_map(|region| {
            (region.start_addr().0..)
                .take(region.len() as usize)
                .step_by(4096)
        })
        .collect();
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut state = shared.state.lock().unwrap();
    loop {
        while state.held && !state.stop {
            state.inside = false;
            shared.changed.notify_all();
            state = shared.changed.wait(state).unwrap();
        }
        if state.stop {
            return;
        }
        state.inside = true;
        for _ in 0..16 {
            random = random
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            if load.pages == 0 {
                state.generation += 1;
            } else {
                let page = (random >> 33) % load.pages;
                write(
                    memory,
                    &mut state,
                    gpas[page as usize % gpas.len()],
                    random & 0x7000_0000 == 0,
                );
            }
        }
        if let Some(disk) = shared.disk.get() {
            let sector = (random >> 33) % (SIZE / 512);
            let byte = if random & 0x7000_0000 == 0 {
                0
            } else {
                random as u8
            };
            disk.write_and_mark(sector * 512, &[byte; 512]);
        }
        shared.changed.notify_all();
        let share = state.share;
        drop(state);
        if share > 0.0 {
            // Not a wait for something: the time itself is what the throttle takes.
            thread::sleep(Duration::from_micros((100.0 * share / (1.0 - share)) as u64));
        }
        // On two cores the engine has to get a turn as well.
        thread::yield_now();
        state = shared.state.lock().unwrap();
    }
}

fn write(memory: &GuestMemory, state: &mut GuestState, gpa: u64, zero: bool) {
    state.generation += 1;
    let stamp = if zero { 0 } else { state.generation };
    state.stamps.insert(gpa, stamp);
    let bytes: Vec<u8> = content(gpa, stamp)
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    memory.write_slice(&bytes, GuestAddress(gpa)).unwrap();
}

fn content(gpa: u64, stamp: u64) -> [u64; 512] {
    std::array::from_fn(|at| {
        if stamp == 0 {
            0
        } else {
            gpa ^ stamp.rotate_left(at as u32)
        }
    })
}
