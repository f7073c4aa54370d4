//! A balloon (virtio 1.2, 5.5), polled: memory outside the working set that the host wants is given up, and taken back
//! when the host wants less.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use guest_core::{PAGE, Share};

use crate::plan::{BarePlan, print_line};
use crate::virtio::{AvailableRing, Device, RingPlace, UsedRing, descriptor};
use crate::work::BareWorker;

/// The kind of device.
const BALLOON: u32 = 5;
// In the configuration space, in pages: what the host wants, and what it has.
const TARGET: u64 = 0;
const ACTUAL: u64 = 4;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Most pages in one request, as Linux has it.
const MOST: u64 = 256;
/// Requests come one after the other.
const SIZE: usize = 1;

/// What is shared with the device.
#[repr(C, align(4096))]
struct BareBalloonQueue {
    /// The pages that a request is about: their addresses in pages.
    numbers: [AtomicU32; MOST as usize],
    descriptors: [[AtomicU64; 2]; SIZE],
    available: AvailableRing<SIZE>,
    used: UsedRing<SIZE>,
}

static QUEUES: [BareBalloonQueue; 2] = [const {
    BareBalloonQueue {
        numbers: [const { AtomicU32::new(0) }; MOST as usize],
        descriptors: [const { [const { AtomicU64::new(0) }; 2] }; SIZE],
        available: AvailableRing::new(),
        used: UsedRing::new(),
    }
}; 2];

/// A balloon that is ready.
pub(crate) struct BareBalloon {
    plan: &'static BarePlan,
    device: Device,
    places: [RingPlace; 2],
    /// Pages in it.
    held: u64,
    /// Of those that were taken back: how many, and how many of them were zero.
    taken: u64,
    zero: u64,
}

impl BareBalloon {
    /// Brings up the machine's balloon, if it has one.
    pub(crate) fn find(plan: &'static BarePlan) -> Option<Self> {
        let device = Device::find(plan.machine.virtio_devices(), BALLOON)?;
        device.negotiate(0)?;
        for (index, queue) in (0..).zip(&QUEUES) {
            let descriptors = &raw const queue.descriptors as u64;
            device.set_up_queue(index, descriptors, &queue.available, &queue.used)?;
        }
        device.start();
        Some(Self {
            plan,
            device,
            places: Default::default(),
            held: 0,
            taken: 0,
            zero: 0,
        })
    }

    /// Goes a step towards what the host wants.
    pub(crate) fn turn(&mut self, worker: &mut BareWorker) {
        let target = u64::from(self.device.config(TARGET));
        if target > self.held {
            let share = worker.give_up(MOST.min(target - self.held));
            if share.count == 0 {
                return;
            }
            self.request(INFLATE, share, worker);
            self.held += share.count;
        } else if target < self.held {
            // The device is notified before a page is touched.
            let share = worker.given_up(MOST.min(self.held - target));
            self.request(DEFLATE, share, worker);
            self.zero += worker.take_back(share);
            self.taken += share.count;
            self.held -= share.count;
        } else {
            return;
        }
        self.device.set_config(ACTUAL, self.held as u32);
        if self.held == target {
            let Self {
                held, taken, zero, ..
            } = self;
            print_line(
                worker.cpu,
                format_args!("balloon pages={held} taken={taken} zero={zero}"),
            );
        }
    }

    /// Passes pages to the device, and waits until it has taken them.
    fn request(&mut self, index: usize, share: Share, worker: &BareWorker) {
        let (queue, place) = (&QUEUES[index], &mut self.places[index]);
        let pages = share.first..share.first + share.count;
        for (number, page) in queue.numbers.iter().zip(pages) {
            let address = self.plan.machine.ranges.address(page).unwrap_or(0);
            number.store((address / PAGE) as u32, Ordering::Relaxed);
        }
        let [address, rest] = &queue.descriptors[0];
        address.store(&raw const queue.numbers as u64, Ordering::Relaxed);
        rest.store(descriptor(4 * share.count, 0, 0), Ordering::Relaxed);
        place.submit(&queue.available, 0);
        place.kick(self.device, index as u32, &queue.available, &queue.used);
        while place.poll(&queue.used).is_none() {
            worker.cpu.read_tsc();
        }
    }
}
