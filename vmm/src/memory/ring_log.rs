//! The dirty log by a ring for each vCPU, which shows which vCPU wrote.
//!
//! ```text
//!  KVM ──▶ rings ── collect, reset (protects the pages again) ──▶ marks ── peek, clear
//! ```
//!
//! A page is marked only after it was protected again. So whatever a vCPU writes to it comes either before the
//! mark, and a stream that clears the mark and then reads sees it, or faults and makes a new entry.
//!
//! On x86 no page escapes the rings: KVM writes guest memory only on behalf of a vCPU that is loaded
//! (kvmclock, steal time, end of interrupt, MSRs), and such writes make entries in that vCPU's ring. The
//! bitmap beside the rings (KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) is for arm64's interrupt tables, and x86 does
//! not have it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::GuestMemory;
use guest_memory::PageMarks;
use kvm_ioctls::{VcpuFd, VmFd};
use migration::{DirtyLog, PageSet, PortError};
use vm_memory::bitmap::NewBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::MemoryError;
use super::marks::{MarkedWords, add_device_writes};
use super::ring::{DirtyPage, DirtyRing, ENTRY};
use crate::kvm;

/// Entries of a ring: as many as KVM allows. A vCPU that fills it has written 256 MiB since its ring was last collected.
const ENTRIES: usize = 65536;

/// Gives each vCPU that is created from now on a ring. Returns how many entries each has.
pub fn enable_rings(vm: &VmFd) -> Result<usize, MemoryError> {
    let most = kvm::max_dirty_ring(vm).ok_or(MemoryError::NoRings)?;
    let bytes = (ENTRIES * ENTRY).min(most);
    kvm::enable_dirty_ring(vm, bytes as u64).map_err(MemoryError::EnableRings)?;
    Ok(bytes / ENTRY)
}

/// The rings of all vCPUs, and what was collected from them.
pub struct RingLog {
    rings: Mutex<Rings>,
    /// For each region what was collected from the rings and not cleared since.
    marks: Vec<PageMarks>,
    /// Entries collected from each vCPU's ring since the log was started.
    by_vcpu: Vec<AtomicU64>,
    // In this order: memory outlives the VM whose slots it is.
    vm: Arc<VmFd>,
    memory: GuestMemory,
}

struct Rings {
    of_vcpu: Vec<DirtyRing>,
    /// Room for what is collected, which is used again.
    collected: Vec<DirtyPage>,
}

impl RingLog {
    /// The rings of `vcpus`, each of `entries`, of a VM that has `memory` as its slots.
    pub fn new(
        vm: Arc<VmFd>,
        memory: GuestMemory,
        vcpus: &[VcpuFd],
        entries: usize,
    ) -> Result<Self, MemoryError> {
        let map = |vcpu| DirtyRing::map(vcpu, entries).map_err(MemoryError::MapRing);
        let of_vcpu = vcpus.iter().map(map).collect::<Result<_, _>>()?;
        let marks = memory
            .iter()
            .map(|region| PageMarks::with_len(region.len() as usize))
            .collect();
        let rings = Rings {
            of_vcpu,
            collected: Vec::new(),
        };
        Ok(Self {
            rings: Mutex::new(rings),
            marks,
            by_vcpu: vcpus.iter().map(|_| AtomicU64::new(0)).collect(),
            vm,
            memory,
        })
    }

    /// Forgets what an earlier log left behind. To be called before logging is turned on.
    pub fn reset(&self) -> Result<(), MemoryError> {
        self.harvest()?;
        for marks in &self.marks {
            marks.clear_all();
        }
        for count in &self.by_vcpu {
            count.store(0, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Marks what is in the rings, and makes room in them. A vCPU whose ring is full calls it as well; then
    /// it can go on.
    pub fn harvest(&self) -> Result<(), MemoryError> {
        let mut rings = self.lock();
        let Rings { of_vcpu, collected } = &mut *rings;
        collected.clear();
        for (ring, count) in of_vcpu.iter_mut().zip(&self.by_vcpu) {
            count.fetch_add(ring.collect(collected), Ordering::Relaxed);
        }
        if collected.is_empty() {
            return Ok(());
        }
        let reset = self.reset_rings(collected.len());
        // Only now, see above; and in any case, or they would be forgotten.
        for DirtyPage { slot, page } in collected {
            // There are no other slots whose writes are logged.
            if let Some(marks) = self.marks.get(*slot as usize) {
                marks.mark(*page as usize);
            }
        }
        reset
    }

    /// Makes KVM protect the pages of this many entries again.
    fn reset_rings(&self, entries: usize) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < entries {
            match kvm::reset_dirty_rings(&self.vm).map_err(MemoryError::ResetRings)? {
                0 => return Err(MemoryError::RingsNotReset { entries, done }),
                count => done += count,
            }
        }
        Ok(())
    }

    fn add_marks(&self, into: &mut PageSet) -> Result<(), MemoryError> {
        self.harvest()?;
        for (index, (region, marks)) in self.memory.iter().zip(&self.marks).enumerate() {
            for (word, marks) in marks.marked() {
                into.insert_words(index, word, &[marks])?;
            }
            add_device_writes(index, region, into)?;
        }
        Ok(())
    }

    fn clear_marks(&self, marked: MarkedWords<'_>) {
        if let Some(marks) = self.marks.get(marked.slot as usize) {
            let first = (marked.first / 64) as usize;
            for (number, word) in (first..).zip(marked.words) {
                marks.clear(number, *word);
            }
        }
        marked.clear_device_writes();
    }

    fn lock(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtyLog for RingLog {
    fn peek(&self, into: &mut PageSet) -> Result<(), PortError> {
        Ok(self.add_marks(into)?)
    }

    fn clear(&self, region: usize, first: u64, words: &[u64]) -> Result<(), PortError> {
        self.clear_marks(MarkedWords::new(&self.memory, region, first, words)?);
        Ok(())
    }

    fn by_vcpu(&self) -> Vec<u64> {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        self.by_vcpu.iter().map(count).collect()
    }
}
