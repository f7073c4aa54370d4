//! A machine without KVM for the engine: sparse memory of any size, a thread that writes to it, and a dirty log.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guest_memory::{GuestMemory, PageMarks};
use migration::{
    BlankDisk, Destination, Difference, DirtyLog, DiskMark, MachineDescription, MemoryKind, MemoryRange,
    MemoryRegion, OfferedDisks, PAGE_SIZE, PageSet, PortError, Rehearsal, Source, SourceDisk, VcpuTime,
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

/// Pieces of memory that are populated, as far apart as they can be.
const PIECES: u64 = 64;
/// Bytes at the start of memory that the guest writes to.
const WORKING_SET: u64 = 64 << 20;
/// The guest rests so long after each write: some 20 MB of pages per second.
const REST: Duration = Duration::from_micros(200);

/// Memory and the guest that writes to it.
pub(crate) struct SparseMachine {
    memory: GuestMemory,
    populated: Vec<MemoryRange>,
    guest: SparseGuest,
}

/// A thread that writes to memory while nothing holds it.
struct SparseGuest {
    held: Arc<Mutex<bool>>,
    ending: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl SparseMachine {
    /// A machine of `bytes`, of which about `populated` have content that is not zero.
    pub(crate) fn new(bytes: u64, populated: u64) -> Result<Self> {
        let memory = sparse_memory(bytes)?;
        let piece = populated / PIECES;
        ensure!(
            bytes / PIECES >= piece && piece >= WORKING_SET,
            "expected more memory than is populated, got {bytes} bytes"
        );
        let ranges: Vec<MemoryRange> = (0..PIECES)
            .map(|n| MemoryRange {
                gpa: n * (bytes / PIECES),
                len: piece,
            })
            .collect();
        for range in &ranges {
            fill(&memory, *range)?;
        }
        let guest = SparseGuest::start(memory.clone());
        Ok(Self {
            memory,
            populated: ranges,
            guest,
        })
    }
}

/// Shared memory, which counts apart from the process's own.
fn sparse_memory(bytes: u64) -> Result<GuestMemory> {
    let file = memfd_create("sparse", MemfdFlags::CLOEXEC).context("memfd")?;
    ftruncate(&file, bytes).with_context(|| format!("memory of {bytes} bytes"))?;
    let len = usize::try_from(bytes)?;
    let region = MmapRegionBuilder::new_with_bitmap(len, PageMarks::with_len(len))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file.into(), 0))
        .build()
        .with_context(|| format!("mapping of {bytes} bytes"))?;
    let region = GuestRegionMmap::new(region, GuestAddress(0)).context("addresses past the end")?;
    Ok(GuestMemory::from_regions(vec![region])?)
}

/// Writes what is neither zero nor alike to a range.
fn fill(memory: &GuestMemory, range: MemoryRange) -> Result<()> {
    let mut piece = vec![0u8; 1 << 20];
    let mut state = range.gpa | 1;
    for word in piece.chunks_exact_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        word.copy_from_slice(&state.to_le_bytes());
    }
    for at in (0..range.len).step_by(piece.len()) {
        piece[..8].copy_from_slice(&(range.gpa + at).to_le_bytes());
        memory.write_slice(&piece, GuestAddress(range.gpa + at))?;
    }
    Ok(())
}

impl SparseGuest {
    fn start(memory: GuestMemory) -> Self {
        let (held, ending, written) = (Arc::new(Mutex::new(false)), Arc::default(), Arc::default());
        let (gate, end, count): (_, Arc<AtomicBool>, Arc<AtomicU64>) =
            (Arc::clone(&held), Arc::clone(&ending), Arc::clone(&written));
        let thread = thread::spawn(move || {
            let mut page = 0;
            while !end.load(Ordering::Relaxed) {
                let gate = gate.lock().unwrap_or_else(PoisonError::into_inner);
                if !*gate {
                    page = (page + 4093) % (WORKING_SET / PAGE_SIZE);
                    let number = count.fetch_add(1, Ordering::Relaxed);
                    // Within memory: nothing to fail.
                    let _ = memory.write_obj(number, GuestAddress(page * PAGE_SIZE + 8));
                }
                drop(gate);
                thread::sleep(REST);
            }
        });
        Self {
            held,
            ending,
            written,
            thread: Some(thread),
        }
    }

    fn hold(&self, held: bool) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
    }
}

impl Drop for SparseGuest {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The marks of the guest's own writes, in the place of KVM's.
struct SparseLog(GuestMemory);

impl DirtyLog for SparseLog {
    fn peek(&self, into: &mut PageSet) -> Result<(), PortError> {
        for (index, region) in self.0.iter().enumerate() {
            for (word, marks) in region.get_mmap().bitmap().marked() {
                into.insert_words(index, word, &[marks])?;
            }
        }
        Ok(())
    }

    fn clear(&self, region: usize, first: u64, words: &[u64]) -> Result<(), PortError> {
        let region = self.0.iter().nth(region).ok_or("no such region")?;
        for (word, marks) in ((first / 64) as usize..).zip(words) {
            region.get_mmap().bitmap().clear(word, *marks);
        }
        Ok(())
    }

    fn by_vcpu(&self) -> Vec<u64> {
        Vec::new()
    }
}

/// The source's ports.
pub(crate) struct SparseSource(SparseMachine);

impl SparseSource {
    pub(crate) fn new(machine: SparseMachine) -> Self {
        Self(machine)
    }
}

impl Source for SparseSource {
    fn describe(&self) -> MachineDescription {
        MachineDescription {
            memory: regions(&self.0.memory),
            memory_kind: MemoryKind::Shared,
            cpus: 1,
            cpu_template: "none".into(),
            cpuid: Vec::new(),
            tsc_khz: 1,
            devices: Vec::new(),
        }
    }

    fn mark_disks(&mut self, _: bool) -> Result<Vec<DiskMark>, PortError> {
        Ok(Vec::new())
    }

    fn memory(&self) -> GuestMemory {
        self.0.memory.clone()
    }

    fn populated(&self, into: &mut PageSet) -> Result<(), PortError> {
        for range in &self.0.populated {
            into.insert_range(*range)?;
        }
        Ok(())
    }

    fn has_unused(&mut self, _: u64, _: Duration) -> Result<bool, PortError> {
        Ok(false)
    }

    fn unused(&mut self, _: Duration, _: &mut PageSet) -> Result<(), PortError> {
        Ok(())
    }

    fn memory_files(&self) -> Option<Vec<OwnedFd>> {
        None
    }

    fn mirror(&mut self, _: &[u32]) -> Result<Vec<Arc<dyn SourceDisk>>, PortError> {
        Err("expected no disk to come along".into())
    }

    fn stop_mirror(&mut self) -> Result<(), PortError> {
        Ok(())
    }

    fn start_dirty_log(&mut self) -> Result<Arc<dyn DirtyLog>, PortError> {
        // As KVM's log does under manual protection, it begins with every page marked.
        for region in self.0.memory.iter() {
            region.bitmap().mark_dirty(0, region.len() as usize);
        }
        Ok(Arc::new(SparseLog(self.0.memory.clone())))
    }

    fn stop_dirty_log(&mut self) -> Result<(), PortError> {
        Ok(())
    }

    fn vcpu_times(&self) -> Vec<VcpuTime> {
        Vec::new()
    }

    fn throttle(&mut self, _: &[f64]) -> Result<(), PortError> {
        Ok(())
    }

    fn flush(&mut self) -> Result<(), PortError> {
        Ok(())
    }

    fn rehearse(&mut self) -> Result<Rehearsal, PortError> {
        Ok(Rehearsal {
            pause: Duration::from_micros(100),
            save: Duration::from_micros(100),
            state: vec![1],
        })
    }

    fn pause(&mut self, _: Instant) -> Result<Instant, PortError> {
        let asked = Instant::now();
        self.0.guest.hold(true);
        Ok(asked)
    }

    fn drain(&mut self, _: Instant) -> Result<(), PortError> {
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, PortError> {
        Ok(self
            .0
            .guest
            .written
            .load(Ordering::Relaxed)
            .to_le_bytes()
            .to_vec())
    }

    fn release(&mut self) -> Result<(), PortError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), PortError> {
        self.0.guest.hold(false);
        Ok(())
    }
}

/// The destination's ports.
#[derive(Default)]
pub(crate) struct SparseDestination {
    memory: Option<GuestMemory>,
    state: Vec<u8>,
}

impl SparseDestination {
    /// An error unless what arrived is what the source has, at the start of each piece and in the working set.
    pub(crate) fn check(&self, source: &SparseSource) -> Result<()> {
        let memory = self.memory.as_ref().context("no memory arrived")?;
        let written = source.0.guest.written.load(Ordering::Relaxed);
        ensure!(self.state == written.to_le_bytes(), "the state is another one");
        let working_set = (0..WORKING_SET / PAGE_SIZE).map(|page| page * PAGE_SIZE + 8);
        let pieces = source.0.populated.iter().map(|range| range.gpa);
        for gpa in pieces.chain(working_set) {
            let here: u64 = memory.read_obj(GuestAddress(gpa))?;
            let there: u64 = source.0.memory.read_obj(GuestAddress(gpa))?;
            ensure!(here == there, "at {gpa:#x}: expected {there:#x}, got {here:#x}");
        }
        Ok(())
    }
}

impl Destination for SparseDestination {
    fn check(&self, _: &MachineDescription, _: &OfferedDisks) -> Vec<Difference> {
        Vec::new()
    }

    fn create(
        &mut self,
        description: &MachineDescription,
        _: Option<Vec<OwnedFd>>,
        _: &OfferedDisks,
    ) -> Result<GuestMemory, PortError> {
        let bytes = description.memory.iter().map(|region| region.len).sum();
        let memory = sparse_memory(bytes)?;
        self.memory = Some(memory.clone());
        Ok(memory)
    }

    fn blank_disks(&self) -> Vec<Arc<dyn BlankDisk>> {
        Vec::new()
    }

    fn is_resident(&self) -> bool {
        false
    }

    fn rehearse(&mut self, _: &[u8]) -> Result<Duration, PortError> {
        Ok(Duration::ZERO)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), PortError> {
        self.state = state.to_vec();
        Ok(())
    }

    fn resume(&mut self, _: Instant) -> Result<(), PortError> {
        Ok(())
    }

    fn discard(&mut self) {
        self.memory = None;
    }
}

fn regions(memory: &GuestMemory) -> Vec<MemoryRegion> {
    let region = |region: &GuestRegionMmap<PageMarks>| MemoryRegion {
        gpa: region.start_addr().0,
        len: region.len(),
    };
    memory.iter().map(region).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_as_sparse_as_it_says_and_writes_until_it_is_held() {
        let machine = SparseMachine::new(64 << 30, PIECES * WORKING_SET).unwrap();
        let mut source = SparseSource::new(machine);
        let log = source.start_dirty_log().unwrap();
        let mut pages = PageSet::of(&source.memory()).unwrap();
        source.populated(&mut pages).unwrap();
        assert_eq!(pages.len(), PIECES * WORKING_SET / PAGE_SIZE);
        for (region, word, words) in pages.filled() {
            log.clear(region, word as u64 * 64, words).unwrap();
        }
        let written = source.0.guest.written.clone();
        let before = written.load(Ordering::Relaxed);
        while written.load(Ordering::Relaxed) < before + 10 {
            thread::sleep(REST);
        }
        source.pause(Instant::now()).unwrap();
        let held = written.load(Ordering::Relaxed);
        thread::sleep(10 * REST);
        assert_eq!(written.load(Ordering::Relaxed), held);
        let mut marked = PageSet::of(&source.memory()).unwrap();
        log.peek(&mut marked).unwrap();
        assert!(marked.len() > 10);
    }
}
