//! A machine in memory: real guest memory, a thread in the place of vCPUs, faults on request.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration_state::{Envelope, Record};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::*;

/// First address of the second region.
pub(super) const HIGH: u64 = 4 << 30;

/// What a call of a port does instead of its work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fault {
    Error,
    Panic,
    /// It works, but later.
    Slow(Duration),
    /// The same, the first time.
    SlowOnce(Duration),
}

/// Faults by the name of the call.
pub(super) type Faults = HashMap<&'static str, Fault>;

/// Memory, and a thread that writes it while nobody holds it.
pub(super) struct Guest {
    pub(super) memory: GuestMemory,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<GuestState>,
    changed: Condvar,
}

/// What is saved and restored, besides memory: the vCPUs' registers, so to speak.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Registers {
    /// Writes so far.
    pub(super) generation: u64,
    /// Generation of each page that was written; 0 means zeroed.
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
}

/// How the thread uses memory.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Load {
    /// Pages from which it writes one at random at a time; 0 means an idle guest that only counts.
    pub(super) pages: u64,
}

impl Guest {
    /// A machine of `low` pages at 0 and `high` at 4 GiB, held.
    pub(super) fn new(low: u64, high: u64) -> Self {
        let ranges = [
            (GuestAddress(0), (low * PAGE_SIZE) as usize),
            (GuestAddress(HIGH), (high * PAGE_SIZE) as usize),
        ];
        Self::with_memory(GuestMemory::from_ranges(&ranges).unwrap())
    }

    fn with_memory(memory: GuestMemory) -> Self {
        let state = GuestState {
            held: true,
            ..GuestState::default()
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        Self {
            memory,
            shared,
            thread: None,
        }
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

    pub(super) fn hold(&self) {
        let mut state = self.shared.state.lock().unwrap();
        state.held = true;
        while state.inside {
            state = self.shared.changed.wait(state).unwrap();
        }
    }

    fn release(&self) {
        self.shared.state.lock().unwrap().held = false;
        self.shared.changed.notify_all();
    }

    pub(super) fn is_held(&self) -> bool {
        self.shared.state.lock().unwrap().held
    }

    /// Returns once the guest has made progress from here on.
    pub(super) fn await_progress(&self) {
        let mut state = self.shared.state.lock().unwrap();
        let from = state.generation;
        while state.generation == from {
            let (next, waited) = self
                .shared
                .changed
                .wait_timeout(state, Duration::from_secs(10))
                .unwrap();
            assert!(!waited.timed_out(), "the guest does not run");
            state = next;
        }
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

    fn load(&self, registers: Registers) {
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
                let page: [u64; 512] = std::array::from_fn(|at| {
                    self.memory.read_obj(GuestAddress(gpa + at as u64 * 8)).unwrap()
                });
                assert_eq!(page, content(gpa, stamp), "page {gpa:#x}");
            }
        }
    }

    fn forget_dirty(&self) {
        for region in self.memory.iter() {
            region.get_mmap().bitmap().reset();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn run(memory: &GuestMemory, shared: &Shared, load: Load) {
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
        shared.changed.notify_all();
        drop(state);
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

/// The source's ports.
pub(super) struct FakeSource {
    pub(super) guest: Guest,
    pub(super) faults: Faults,
    pub(super) logging: bool,
    pub(super) locked: bool,
    /// Page written by `save`, as a clock's page would be.
    pub(super) written_by_save: Option<u64>,
    /// Called by `pause`, to make something happen right then.
    pub(super) on_pause: Option<Box<dyn FnMut() + Send>>,
    /// The same for `release`.
    pub(super) on_release: Option<Box<dyn FnMut() + Send>>,
    pub(super) calls: Vec<&'static str>,
}

impl FakeSource {
    pub(super) fn new(guest: Guest) -> Self {
        Self {
            guest,
            faults: Faults::new(),
            logging: false,
            locked: true,
            written_by_save: None,
            on_pause: None,
            on_release: None,
            calls: Vec::new(),
        }
    }

    /// Asserts that the guest runs here as before a migration.
    pub(super) fn assert_runs(&self) {
        assert!(
            !self.guest.is_held(),
            "the guest is held; calls: {:?}",
            self.calls
        );
        self.guest.await_progress();
        assert!(!self.logging, "dirty logging is on; calls: {:?}", self.calls);
        assert!(self.locked, "the disk locks are gone");
    }

    fn enter(&mut self, call: &'static str) -> Result<(), MachineError> {
        self.calls.push(call);
        if let Some(&Fault::SlowOnce(time)) = self.faults.get(call) {
            self.faults.insert(call, Fault::Slow(time));
            let slow = fault(&self.faults, call);
            self.faults.remove(call);
            return slow;
        }
        fault(&self.faults, call)
    }
}

fn fault(faults: &Faults, call: &'static str) -> Result<(), MachineError> {
    match faults.get(call) {
        None => Ok(()),
        Some(Fault::Error) => Err(format!("injected into {call}").into()),
        Some(Fault::Panic) => panic!("injected into {call}"),
        Some(Fault::Slow(time) | Fault::SlowOnce(time)) => {
            // Not a wait for something: the time itself is what is simulated.
            thread::sleep(*time);
            Ok(())
        }
    }
}

pub(super) fn describe(memory: &GuestMemory) -> MachineDescription {
    MachineDescription {
        memory: memory
            .iter()
            .map(|region| MemoryRegion {
                gpa: region.start_addr().0,
                len: region.len(),
            })
            .collect(),
        shared_memory: false,
        cpus: 1,
        cpu_template: "none".into(),
        cpuid: vec![CpuidLeaf {
            function: 1,
            index: 0,
            registers: [1, 2, 3, 4],
        }],
        tsc_khz: 2_000_000,
        devices: Vec::new(),
    }
}

impl Source for FakeSource {
    fn describe(&self) -> MachineDescription {
        describe(&self.guest.memory)
    }

    fn memory(&self) -> GuestMemory {
        self.guest.memory.clone()
    }

    fn start_dirty_log(&mut self) -> Result<(), MachineError> {
        self.logging = true;
        self.guest.forget_dirty();
        self.enter("start_dirty_log")
    }

    fn stop_dirty_log(&mut self) -> Result<(), MachineError> {
        self.logging = false;
        self.enter("stop_dirty_log")
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<(), MachineError> {
        assert!(self.logging);
        self.enter("harvest")?;
        for (index, region) in self.guest.memory.iter().enumerate() {
            into.insert_bitmap(index, &region.get_mmap().bitmap().get_and_reset())?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), MachineError> {
        assert!(!self.guest.is_held());
        self.enter("flush")
    }

    fn pause(&mut self) -> Result<Instant, MachineError> {
        let now = Instant::now();
        self.guest.hold();
        if let Some(on_pause) = &mut self.on_pause {
            on_pause();
        }
        self.enter("pause")?;
        Ok(now)
    }

    fn drain(&mut self) -> Result<(), MachineError> {
        assert!(self.guest.is_held());
        // A device completes a request into guest memory.
        self.guest.write(PAGE_SIZE, false);
        self.enter("drain")
    }

    fn save(&mut self) -> Result<Vec<u8>, MachineError> {
        self.enter("save")?;
        if let Some(gpa) = self.written_by_save {
            self.guest.write(gpa, false);
        }
        let mut envelope = Envelope::new();
        envelope.put("guest", &self.guest.registers())?;
        Ok(envelope.encode())
    }

    fn release(&mut self) -> Result<(), MachineError> {
        self.enter("release")?;
        self.locked = false;
        if let Some(on_release) = &mut self.on_release {
            on_release();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.locked = true;
        self.guest.release();
        self.enter("resume")
    }
}

/// The destination's ports.
#[derive(Default)]
pub(super) struct FakeDestination {
    pub(super) guest: Option<Guest>,
    pub(super) faults: Faults,
    pub(super) differences: Vec<Difference>,
    /// Pages that `create` forgets to build.
    pub(super) missing_pages: u64,
    pub(super) running: bool,
    pub(super) stopped_at: Option<Instant>,
    pub(super) discarded: u32,
}

impl Destination for FakeDestination {
    fn check(&self, _: &MachineDescription) -> Vec<Difference> {
        if let Err(error) = fault(&self.faults, "check") {
            return vec![Difference {
                what: "fault".into(),
                expected: "none".into(),
                got: error.to_string(),
            }];
        }
        self.differences.clone()
    }

    fn create(&mut self, description: &MachineDescription) -> Result<GuestMemory, MachineError> {
        assert!(self.guest.is_none() && !self.running);
        let pages: Vec<u64> = description
            .memory
            .iter()
            .map(|region| region.len / PAGE_SIZE)
            .collect();
        let guest = Guest::new(pages[0] - self.missing_pages, pages[1]);
        let memory = guest.memory.clone();
        self.guest = Some(guest);
        fault(&self.faults, "create")?;
        Ok(memory)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), MachineError> {
        fault(&self.faults, "restore")?;
        let mut envelope = Envelope::decode(state)?;
        self.guest
            .as_ref()
            .ok_or("not built")?
            .load(envelope.take("guest")?);
        Ok(envelope.finish()?)
    }

    fn resume(&mut self, stopped_at: Instant) -> Result<(), MachineError> {
        fault(&self.faults, "resume")?;
        self.stopped_at = Some(stopped_at);
        self.running = true;
        Ok(())
    }

    fn discard(&mut self) {
        assert!(!self.running);
        self.discarded += 1;
        self.guest = None;
        let _ = fault(&self.faults, "discard");
    }
}
