//! A disk on virtio-mmio (virtio 1.2, 4.2 and 5.2), polled: no interrupt is wanted, a request is one page.
//!
//! All that the device and this CPU share is atomic; only the pages themselves are plain memory, which belongs to
//! the device from [`Disk::submit`] until [`Disk::poll`] returns the request.

#![allow(
    unsafe_code,
    reason = "memory-mapped registers, and pages that the device reads and writes"
)]

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use guest_core::{PAGE, Settings, WORDS};

/// Most requests at a time.
const SLOTS: usize = Settings::MAX_READS as usize;
/// Descriptors of a request: header, page, status.
const PARTS: usize = 3;
/// Size of the queue, a power of two.
const SIZE: usize = (SLOTS * PARTS).next_power_of_two();
const SECTORS_PER_PAGE: u64 = PAGE / 512;

// Registers (virtio 1.2, 4.2.2).
const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS: u64 = 0x080;
const QUEUE_AVAILABLE: u64 = 0x090;
const QUEUE_USED: u64 = 0x0a0;
const CAPACITY: u64 = 0x100;

const MAGIC_VALUE: u32 = 0x7472_6976;
const BLOCK: u32 = 2;
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

const F_RO: u32 = 1 << 5;
/// Accepted, though nothing here flushes: without it the device writes through.
const F_FLUSH: u32 = 1 << 9;
/// Bit 32, in the second half.
const F_VERSION_1: u32 = 1;

const NEXT: u64 = 1;
const WRITE: u64 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
/// The status of a request that the device could not carry out.
pub(crate) const IO_ERROR: u8 = 1;
/// No device writes this as a status.
const UNDONE: u8 = 0xff;

/// What is asked of the disk.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Read = 0,
    Write = 1,
}

/// A request that came back.
pub(crate) struct Done {
    /// By which it was submitted.
    pub(crate) slot: usize,
    pub(crate) kind: Kind,
    /// The page of the disk.
    pub(crate) page: u64,
    /// 0 if it went well.
    pub(crate) status: u8,
}

/// A disk that is ready.
pub(crate) struct Disk {
    registers: u64,
    pub(crate) read_only: bool,
    /// Pages on it.
    pub(crate) pages: u64,
    /// Requests that were made available and that came back, as the rings count.
    available: u16,
    used: u16,
}

/// The header of a request, its status, and what it is about, in a cache line of their own.
#[repr(C, align(64))]
struct Request {
    kind: AtomicU32,
    reserved: AtomicU32,
    sector: AtomicU64,
    status: AtomicU8,
}

#[repr(C, align(64))]
struct Available {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [AtomicU16; SIZE],
}

#[repr(C, align(64))]
struct Used {
    flags: AtomicU16,
    index: AtomicU16,
    /// Number of the chain's first descriptor, bytes written.
    ring: [[AtomicU32; 2]; SIZE],
}

/// What is shared with the device.
#[repr(C, align(4096))]
struct Queue {
    pages: [UnsafeCell<[u64; WORDS]>; SLOTS],
    /// Address; length, flags and next.
    descriptors: [[AtomicU64; 2]; SIZE],
    requests: [Request; SLOTS],
    available: Available,
    used: Used,
}

// SAFETY: all but `pages` is atomic, and these belong to the one `Disk` of this guest or to the device.
unsafe impl Sync for Queue {}

static QUEUE: Queue = Queue {
    pages: [const { UnsafeCell::new([0; WORDS]) }; SLOTS],
    descriptors: [const { [const { AtomicU64::new(0) }; 2] }; SIZE],
    requests: [const {
        Request {
            kind: AtomicU32::new(0),
            reserved: AtomicU32::new(0),
            sector: AtomicU64::new(0),
            status: AtomicU8::new(0),
        }
    }; SLOTS],
    available: Available {
        flags: AtomicU16::new(0),
        index: AtomicU16::new(0),
        ring: [const { AtomicU16::new(0) }; SIZE],
    },
    used: Used {
        flags: AtomicU16::new(0),
        index: AtomicU16::new(0),
        ring: [const { [const { AtomicU32::new(0) }; 2] }; SIZE],
    },
};

impl Disk {
    /// Brings up the first disk among virtio-mmio devices at these addresses. Called once. `None` if there is no
    /// disk, or if it does not agree.
    pub(crate) fn find(mut addresses: impl Iterator<Item = u64>) -> Option<Self> {
        let is_disk = |registers: &u64| {
            let identity = [MAGIC, VERSION, DEVICE_ID].map(|register| read(*registers, register));
            identity == [MAGIC_VALUE, 2, BLOCK]
        };
        Self::bring_up(addresses.find(is_disk)?)
    }

    fn bring_up(registers: u64) -> Option<Self> {
        let (get, set) = (
            |register| read(registers, register),
            |register, value| write(registers, register, value),
        );
        set(STATUS, 0);
        set(STATUS, ACKNOWLEDGE | DRIVER);
        set(DEVICE_FEATURES_SELECT, 0);
        let features = get(DEVICE_FEATURES) & (F_RO | F_FLUSH);
        for (half, features) in [(0, features), (1, F_VERSION_1)] {
            set(DRIVER_FEATURES_SELECT, half);
            set(DRIVER_FEATURES, features);
        }
        set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        set(QUEUE_SELECT, 0);
        if get(STATUS) & FEATURES_OK == 0 || get(QUEUE_SIZE_MAX) < SIZE as u32 {
            return None;
        }
        set(QUEUE_SIZE, SIZE as u32);
        for (register, address) in [
            (QUEUE_DESCRIPTORS, &raw const QUEUE.descriptors as u64),
            (QUEUE_AVAILABLE, &raw const QUEUE.available as u64),
            (QUEUE_USED, &raw const QUEUE.used as u64),
        ] {
            set(register, address as u32);
            set(register + 4, (address >> 32) as u32);
        }
        for slot in 0..SLOTS {
            lay_out(slot);
        }
        QUEUE.available.flags.store(NO_INTERRUPT, Ordering::Release);
        set(QUEUE_READY, 1);
        set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        let sectors = u64::from(get(CAPACITY + 4)) << 32 | u64::from(get(CAPACITY));
        Some(Self {
            registers,
            read_only: features & F_RO != 0,
            pages: sectors / SECTORS_PER_PAGE,
            available: 0,
            used: 0,
        })
    }

    /// The memory of a request that is not under way.
    pub(crate) fn page(&mut self, slot: usize) -> &mut [u64; WORDS] {
        // SAFETY: there is one `Disk`, and the caller keeps to it that the device does not have this request.
        unsafe { &mut *QUEUE.pages[slot].get() }
    }

    /// Makes a request for page `page` of the disk available, with the memory of `slot`, which is not under way.
    /// The device is told by [`Disk::kick`].
    pub(crate) fn submit(&mut self, slot: usize, kind: Kind, page: u64) {
        let request = &QUEUE.requests[slot];
        request.kind.store(kind as u32, Ordering::Relaxed);
        request.sector.store(page * SECTORS_PER_PAGE, Ordering::Relaxed);
        request.status.store(UNDONE, Ordering::Relaxed);
        let flags = match kind {
            Kind::Read => NEXT | WRITE,
            Kind::Write => NEXT,
        };
        let (index, head) = (slot * PARTS + 1, (slot * PARTS) as u16);
        QUEUE.descriptors[index][1].store(descriptor(PAGE, flags, index + 1), Ordering::Relaxed);
        QUEUE.available.ring[usize::from(self.available) % SIZE].store(head, Ordering::Relaxed);
        self.available = self.available.wrapping_add(1);
    }

    /// Shows the device what was submitted, and writes its register unless it is at work anyway.
    pub(crate) fn kick(&self) {
        if QUEUE.available.index.load(Ordering::Relaxed) == self.available {
            return;
        }
        QUEUE.available.index.store(self.available, Ordering::Release);
        // Between that and a look at what the device wants to hear (virtio 1.2, 2.7.13.4).
        fence(Ordering::SeqCst);
        if QUEUE.used.flags.load(Ordering::Relaxed) & NO_NOTIFY == 0 {
            write(self.registers, QUEUE_NOTIFY, 0);
        }
    }

    /// The next request that came back.
    pub(crate) fn poll(&mut self) -> Option<Done> {
        if QUEUE.used.index.load(Ordering::Acquire) == self.used {
            return None;
        }
        let [head, _] = &QUEUE.used.ring[usize::from(self.used) % SIZE];
        self.used = self.used.wrapping_add(1);
        // A device that names no request of ours ends in a panic, which is reported.
        let slot = head.load(Ordering::Relaxed) as usize / PARTS;
        let request = &QUEUE.requests[slot];
        let is_write = request.kind.load(Ordering::Relaxed) == Kind::Write as u32;
        Some(Done {
            slot,
            kind: if is_write { Kind::Write } else { Kind::Read },
            page: request.sector.load(Ordering::Relaxed) / SECTORS_PER_PAGE,
            status: request.status.load(Ordering::Relaxed),
        })
    }
}

/// Writes what no request changes of a slot's descriptors.
fn lay_out(slot: usize) {
    let request = &QUEUE.requests[slot];
    let first = slot * PARTS;
    let [header, page, status] = [
        &raw const request.kind as u64,
        QUEUE.pages[slot].get() as u64,
        &raw const request.status as u64,
    ];
    for (index, address, rest) in [
        (first, header, descriptor(16, NEXT, first + 1)),
        (first + 1, page, 0),
        (first + 2, status, descriptor(1, WRITE, 0)),
    ] {
        QUEUE.descriptors[index][0].store(address, Ordering::Relaxed);
        QUEUE.descriptors[index][1].store(rest, Ordering::Relaxed);
    }
}

/// The second half of a descriptor.
fn descriptor(len: u64, flags: u64, next: usize) -> u64 {
    len | flags << 32 | (next as u64) << 48
}

fn write(registers: u64, register: u64, value: u32) {
    // SAFETY: an aligned register of a device that the command line names, mapped by `boot.s`.
    unsafe { ((registers + register) as *mut u32).write_volatile(value) };
}

fn read(registers: u64, register: u64) -> u32 {
    // SAFETY: as above.
    unsafe { ((registers + register) as *const u32).read_volatile() }
}
