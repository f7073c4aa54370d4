//! A disk (virtio 1.2, 5.2), polled: a request is one page.
//!
//! All that the device and this CPU share is atomic; only the pages themselves are plain memory, which belongs to
//! the device from [`BareDisk::submit`] until [`BareDisk::poll`] returns the request.

#![allow(unsafe_code, reason = "pages that the device reads and writes")]

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use guest_core::{BareSettings, PAGE, WORDS};

use crate::virtio::{AvailableRing, Device, NEXT, RingPlace, UsedRing, WRITE, descriptor};

/// Most requests at a time.
const SLOTS: usize = BareSettings::MAX_READS as usize;
/// Descriptors of a request: header, page, status.
const PARTS: usize = 3;
/// Size of the queue, a power of two.
const SIZE: usize = (SLOTS * PARTS).next_power_of_two();
const SECTORS_PER_PAGE: u64 = PAGE / 512;

/// The kind of device.
const BLOCK: u32 = 2;
/// In the configuration space.
const CAPACITY: u64 = 0;

const F_RO: u32 = 1 << 5;
/// Accepted, though nothing here flushes: without it the device writes through.
const F_FLUSH: u32 = 1 << 9;

/// The status of a request that the device could not carry out.
pub(crate) const IO_ERROR: u8 = 1;
/// No device writes this as a status.
const UNDONE: u8 = 0xff;

/// What is asked of the disk.
#[derive(Clone, Copy)]
pub(crate) enum BareOperation {
    Read = 0,
    Write = 1,
}

/// A request that came back.
pub(crate) struct Done {
    /// By which it was submitted.
    pub(crate) slot: usize,
    pub(crate) kind: BareOperation,
    /// The page of the disk.
    pub(crate) page: u64,
    /// 0 if it went well.
    pub(crate) status: u8,
}

/// A disk that is ready.
pub(crate) struct BareDisk {
    device: Device,
    pub(crate) read_only: bool,
    /// Pages on it.
    pub(crate) pages: u64,
    place: RingPlace,
}

/// The header of a request, its status, and what it is about, in a cache line of their own.
#[repr(C, align(64))]
struct BareDiskRequest {
    kind: AtomicU32,
    reserved: AtomicU32,
    sector: AtomicU64,
    status: AtomicU8,
}

/// What is shared with the device.
#[repr(C, align(4096))]
struct BareDiskQueue {
    pages: [UnsafeCell<[u64; WORDS]>; SLOTS],
    /// Address; length, flags and next.
    descriptors: [[AtomicU64; 2]; SIZE],
    requests: [BareDiskRequest; SLOTS],
    available: AvailableRing<SIZE>,
    used: UsedRing<SIZE>,
}

// SAFETY: all but `pages` is atomic, and these belong to the one `BareDisk` of this guest or to the device.
unsafe impl Sync for BareDiskQueue {}

static QUEUE: BareDiskQueue = BareDiskQueue {
    pages: [const { UnsafeCell::new([0; WORDS]) }; SLOTS],
    descriptors: [const { [const { AtomicU64::new(0) }; 2] }; SIZE],
    requests: [const {
        BareDiskRequest {
            kind: AtomicU32::new(0),
            reserved: AtomicU32::new(0),
            sector: AtomicU64::new(0),
            status: AtomicU8::new(0),
        }
    }; SLOTS],
    available: AvailableRing::new(),
    used: UsedRing::new(),
};

impl BareDisk {
    /// Brings up the first disk among virtio-mmio devices at these addresses. Called once. `None` if there is no
    /// disk, or if it does not agree.
    pub(crate) fn find(addresses: impl Iterator<Item = u64>) -> Option<Self> {
        let device = Device::find(addresses, BLOCK)?;
        let features = device.negotiate(F_RO | F_FLUSH)?;
        for slot in 0..SLOTS {
            lay_out(slot);
        }
        let descriptors = &raw const QUEUE.descriptors as u64;
        device.set_up_queue(0, descriptors, &QUEUE.available, &QUEUE.used)?;
        device.start();
        let [low, high] = [CAPACITY, CAPACITY + 4].map(|offset| u64::from(device.config(offset)));
        Some(Self {
            device,
            read_only: features & F_RO != 0,
            pages: (high << 32 | low) / SECTORS_PER_PAGE,
            place: RingPlace::default(),
        })
    }

    /// The memory of a request that is not under way.
    pub(crate) fn page(&mut self, slot: usize) -> &mut [u64; WORDS] {
        // SAFETY: there is one `BareDisk`, and the caller keeps to it that the device does not have this request.
        unsafe { &mut *QUEUE.pages[slot].get() }
    }

    /// Makes a request for page `page` of the disk available, with the memory of `slot`, which is not under way.
    /// [`BareDisk::kick`] notifies the device.
    pub(crate) fn submit(&mut self, slot: usize, kind: BareOperation, page: u64) {
        let request = &QUEUE.requests[slot];
        request.kind.store(kind as u32, Ordering::Relaxed);
        request.sector.store(page * SECTORS_PER_PAGE, Ordering::Relaxed);
        request.status.store(UNDONE, Ordering::Relaxed);
        let flags = match kind {
            BareOperation::Read => NEXT | WRITE,
            BareOperation::Write => NEXT,
        };
        let (index, head) = (slot * PARTS + 1, (slot * PARTS) as u16);
        QUEUE.descriptors[index][1].store(descriptor(PAGE, flags, index + 1), Ordering::Relaxed);
        self.place.submit(&QUEUE.available, head);
    }

    /// Shows the device what was submitted, and writes its register unless it is at work anyway.
    pub(crate) fn kick(&self) {
        self.place.kick(self.device, 0, &QUEUE.available, &QUEUE.used);
    }

    /// The next request that came back.
    pub(crate) fn poll(&mut self) -> Option<Done> {
        let head = self.place.poll(&QUEUE.used)?;
        // A device that names a request that was not made ends in a panic, which is reported.
        let slot = head as usize / PARTS;
        let request = &QUEUE.requests[slot];
        let is_write = request.kind.load(Ordering::Relaxed) == BareOperation::Write as u32;
        Some(Done {
            slot,
            kind: if is_write {
                BareOperation::Write
            } else {
                BareOperation::Read
            },
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
