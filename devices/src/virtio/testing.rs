//! A driver for tests: sets up queues through the registers and puts descriptor chains into guest memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use guest_memory::PageMarks;
use migration_state::Envelope;
use tempfile::TempDir;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::mmio::{MmioTransport, MmioTransportError, TransportWorker};
use super::rng::VirtioRng;
use super::{HostBackend, VirtioDevice};
use crate::GuestMemory;
use crate::bus::BusDevice;
use crate::rate::Limits;

/// Where the rings of queue 0 are; those of each further queue are [`QUEUE_BYTES`] above the ones before.
pub(crate) const DESCRIPTORS: u64 = 0x1000;
pub(crate) const AVAILABLE: u64 = 0x3000;
pub(crate) const USED: u64 = 0x4000;
const QUEUE_BYTES: u64 = 0x4000;
/// Where tests put their buffers; memory ends at [`END`].
pub(crate) const DATA: u64 = 0x4_0000;
pub(crate) const END: u64 = 0x20_0000;

pub(crate) const VERSION_1: u64 = 1 << 32;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DriverBuffer {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) write: bool,
}

pub(crate) fn reads(address: u64, len: u32) -> DriverBuffer {
    DriverBuffer {
        address,
        len,
        write: false,
    }
}

pub(crate) fn writes(address: u64, len: u32) -> DriverBuffer {
    DriverBuffer {
        address,
        len,
        write: true,
    }
}

/// An entropy device without limits, the simplest device.
pub(crate) fn rng() -> VirtioRng {
    VirtioRng::new(Limits::default()).unwrap()
}

/// A folder for a device's files, in memory: what a device makes durable there costs nothing.
pub(crate) fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

pub(crate) fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), END as usize)]).unwrap()
}

pub(crate) struct Driver {
    pub(crate) transport: MmioTransport,
    pub(crate) memory: GuestMemory,
    line: EventFd,
    thread: EventManager<TransportWorker>,
    queues: Vec<DriverQueue>,
    selected: usize,
}

/// A driver's position in a queue.
#[derive(Clone, Copy, Debug, Default)]
struct DriverQueue {
    /// As large as the device allows.
    size: u16,
    next_descriptor: u16,
    added: u16,
    seen: u16,
}

impl Driver {
    /// A device after power-on.
    pub(crate) fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::with_memory(device, memory())
    }

    fn with_memory(device: impl VirtioDevice + 'static, memory: GuestMemory) -> Self {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let transport =
            MmioTransport::new(Box::new(device), memory.clone(), line.try_clone().unwrap()).unwrap();
        let mut thread = EventManager::new().unwrap();
        thread.add_subscriber(transport.worker());
        let queues = vec![DriverQueue::default(); transport.queue_events().len()];
        let mut driver = Self {
            transport,
            memory,
            line,
            thread,
            queues,
            selected: 0,
        };
        for index in 0..driver.queues.len() {
            driver.set(0x030, index as u32);
            driver.queues[index].size = driver.get(0x034) as u16;
        }
        driver.set(0x030, 0);
        driver
    }

    /// A device that the driver has brought up, with all features.
    pub(crate) fn ready(device: impl VirtioDevice + 'static) -> Self {
        let mut driver = Self::new(device);
        driver.bring_up();
        driver
    }

    pub(crate) fn bring_up(&mut self) {
        let features = self.offered();
        self.bring_up_with(features);
    }

    pub(crate) fn bring_up_with(&mut self, features: u64) {
        assert!(self.negotiate(features));
        for index in (0..self.queues.len()).rev() {
            self.select(index);
            self.set_up_queue(self.at(DESCRIPTORS), self.at(AVAILABLE), self.at(USED));
            self.memory
                .write_slice(&[0; QUEUE_BYTES as usize], GuestAddress(self.at(DESCRIPTORS)))
                .unwrap();
            let size = self.queues[index].size;
            self.queues[index] = DriverQueue {
                size,
                ..Default::default()
            };
        }
        self.set(0x070, 15);
        assert_eq!(self.get(0x070), 15);
    }

    /// Selects the queue for the following calls; at first, and after bringing the device up, that is the first queue.
    pub(crate) fn select(&mut self, index: usize) -> &mut Self {
        self.selected = index;
        self
    }

    /// Queues of the device.
    pub(crate) fn queue_count(&self) -> usize {
        self.queues.len()
    }

    fn queue(&mut self) -> &mut DriverQueue {
        &mut self.queues[self.selected]
    }

    /// The address in the selected queue that corresponds to one in the first queue.
    fn at(&self, address: u64) -> u64 {
        address + QUEUE_BYTES * self.selected as u64
    }

    pub(crate) fn offered(&mut self) -> u64 {
        self.set(0x014, 1);
        let high = self.get(0x010);
        self.set(0x014, 0);
        u64::from(high) << 32 | u64::from(self.get(0x010))
    }

    /// Goes as far as FEATURES_OK; returns whether the device accepted that.
    pub(crate) fn negotiate(&mut self, features: u64) -> bool {
        self.set(0x070, 0);
        self.set(0x070, 1);
        self.set(0x070, 3);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(0x024, select);
            self.set(0x020, half);
        }
        self.set(0x070, 11);
        self.get(0x070) == 11
    }

    pub(crate) fn set_up_queue(&mut self, descriptors: u64, available: u64, used: u64) {
        self.set(0x030, self.selected as u32);
        let size = self.queue().size;
        self.set(0x038, u32::from(size));
        for (register, address) in [(0x080, descriptors), (0x090, available), (0x0a0, used)] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(0x044, 1);
    }

    pub(crate) fn get(&mut self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    pub(crate) fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// The head of the next chain.
    pub(crate) fn next_head(&mut self) -> u64 {
        self.queue().next_descriptor.into()
    }

    /// Makes a chain available, without a kick; returns its head.
    pub(crate) fn add(&mut self, parts: &[DriverBuffer]) -> u16 {
        let head = self.queue().next_descriptor;
        for (index, part) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let at = self.queue().next_descriptor;
            let next = (at + 1) % self.queue().size;
            self.queue().next_descriptor = next;
            let flags = if part.write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.describe(at, part.address, part.len, flags, next);
        }
        self.publish(head);
        head
    }

    pub(crate) fn describe(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&address.to_le_bytes());
        descriptor[8..12].copy_from_slice(&len.to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        descriptor[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(self.at(DESCRIPTORS) + 16 * u64::from(index));
        self.memory.write_slice(&descriptor, at).unwrap();
    }

    pub(crate) fn publish(&mut self, head: u16) {
        let available = self.at(AVAILABLE);
        let added = self.queue().added;
        let entry = available + 4 + 2 * u64::from(added % self.queue().size);
        self.memory.write_obj(head.to_le(), GuestAddress(entry)).unwrap();
        let added = added.wrapping_add(1);
        self.queue().added = added;
        self.memory
            .write_obj(added.to_le(), GuestAddress(available + 2))
            .unwrap();
    }

    /// Kicks the queue and lets the device thread work until it has nothing left to do.
    pub(crate) fn kick(&mut self) {
        self.set(0x050, self.selected as u32);
        self.run();
    }

    /// Runs the device thread once; returns whether there was any event.
    pub(crate) fn turn(&mut self) -> bool {
        self.thread.run_with_timeout(0).unwrap() > 0
    }

    /// Waits until there is an event, and runs the device thread once.
    pub(crate) fn wait(&mut self) {
        let begin = Instant::now();
        // Finished I/O can interrupt the wait before its event is there.
        while self.thread.run_with_timeout(10_000).unwrap() == 0 {
            assert!(
                begin.elapsed() < Duration::from_secs(10),
                "nothing in ten seconds"
            );
        }
    }

    pub(crate) fn run(&mut self) {
        // A turn that makes no progress would show up as a loop without an end.
        for _ in 0..10_000 {
            if !self.turn() {
                return;
            }
        }
        panic!("the device thread does not come to rest");
    }

    /// (head, bytes written) of the chains that came back since the last call.
    pub(crate) fn used(&mut self) -> Vec<(u32, u32)> {
        let ring = self.at(USED);
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let mut used = Vec::new();
        let mut seen = self.queue().seen;
        while seen != index {
            let at = ring + 4 + 8 * u64::from(seen % self.queue().size);
            used.push(self.memory.read_obj::<[u32; 2]>(GuestAddress(at)).unwrap().into());
            seen = seen.wrapping_add(1);
        }
        self.queue().seen = seen;
        // used_event: interrupt after the next chain.
        let used_event = self.at(AVAILABLE) + 4 + 2 * u64::from(self.queue().size);
        self.memory.write_obj(seen, GuestAddress(used_event)).unwrap();
        used
    }

    /// Chains that came back since the device was brought up.
    pub(crate) fn used_count(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.at(USED) + 2)).unwrap()
    }

    /// As [`Driver::used`], once there are `count` chains.
    pub(crate) fn wait_for(&mut self, count: usize) -> Vec<(u32, u32)> {
        let mut used = self.used();
        while used.len() < count {
            self.wait();
            used.extend(self.used());
        }
        used
    }

    /// Adds a chain, kicks, and returns the bytes written to it once it is back.
    pub(crate) fn submit(&mut self, parts: &[DriverBuffer]) -> u32 {
        let head = self.add(parts);
        self.kick();
        let used = self.wait_for(1);
        assert_eq!(used.len(), 1, "{used:?}");
        assert_eq!(used[0].0, u32::from(head));
        used[0].1
    }

    /// The device's backend on the host.
    pub(crate) fn backend(&self) -> Arc<dyn HostBackend> {
        self.transport.host_backend().unwrap()
    }

    /// Interrupts since the last call.
    pub(crate) fn interrupts(&self) -> u64 {
        self.line.read().unwrap_or(0)
    }

    /// The counter of that name, of the transport or of the device.
    pub(crate) fn count(&self, name: &str) -> u64 {
        let counters = self.transport.metrics();
        let mut all = counters.iter().flat_map(|counters| counters.read());
        all.find(|(other, _)| *other == name).expect("a counter").1
    }

    pub(crate) fn fill(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Whether the page is marked as written by a device.
    pub(crate) fn is_dirty(&self, address: u64) -> bool {
        let region: &MmapRegion<PageMarks> = self.memory.find_region(GuestAddress(address)).unwrap();
        region.bitmap().dirty_at(address as usize)
    }

    /// As [`Driver::is_dirty`], and unmarks all.
    pub(crate) fn take_dirty(&self, address: u64) -> bool {
        let region: &MmapRegion<PageMarks> = self.memory.find_region(GuestAddress(address)).unwrap();
        let dirty = self.is_dirty(address);
        region.bitmap().clear_all();
        dirty
    }

    pub(crate) fn save(&self) -> Envelope {
        self.transport.pause();
        self.transport
            .drain(Instant::now() + Duration::from_secs(10))
            .unwrap();
        let mut envelope = Envelope::new();
        self.transport.save(&mut envelope, "dev0").unwrap();
        Envelope::decode(&envelope.encode()).unwrap()
    }

    /// The driver with its memory on another device, restored and still paused.
    pub(crate) fn move_to(
        &self,
        device: impl VirtioDevice + 'static,
        mut envelope: Envelope,
    ) -> Result<Self, MmioTransportError> {
        let mut moved = Self::with_memory(device, self.memory.clone());
        moved.transport.restore(&mut envelope, "dev0")?;
        envelope.finish().unwrap();
        Ok(Self {
            queues: self.queues.clone(),
            selected: self.selected,
            ..moved
        })
    }
}
