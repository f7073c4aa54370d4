//! The disk workload: pages at random places, so many at a time, each checked.

use core::sync::atomic::Ordering;

use guest_core::{Random, body_intact, check, fill_body, stamp};

use crate::cpu;
use crate::disk::{Disk, Done, Kind};
use crate::machine::split;
use crate::plan::{Plan, say};
use crate::work::Worker;

/// A stamp is one cache line, and looked at after each read; the body after each of so many.
const BODY_EACH: u64 = 16;

/// A disk whose pages carry the stamps of their numbers, and the reads that are under way.
pub(crate) struct Reads {
    disk: Disk,
    random: Random,
    done: u64,
}

impl Reads {
    /// Stamps the disk, if it can be written, and begins to read. `None` if the command line does not want it.
    pub(crate) fn begin(plan: &Plan, worker: &Worker) -> Option<Self> {
        let depth = plan.machine.settings.reads as usize;
        if depth == 0 {
            return None;
        }
        let Some(disk) = Disk::find(plan.machine.virtio_devices()).filter(|disk| disk.pages > 0) else {
            say(
                worker.cpu,
                format_args!("fault disk expected=virtio-blk got=nothing"),
            );
            cpu::stop();
        };
        let mut reads = Self {
            disk,
            random: Random::new(cpu::tsc()),
            done: 0,
        };
        if !reads.disk.read_only {
            reads.stamp(depth, worker);
        }
        for slot in 0..depth {
            reads.read(slot);
        }
        reads.disk.kick();
        Some(reads)
    }

    /// Checks what came, and asks for as much again.
    pub(crate) fn turn(&mut self, worker: &Worker) {
        while let Some(done) = self.disk.poll() {
            self.check(&done, worker);
            self.read(done.slot);
        }
        self.disk.kick();
        worker.cpu.reads.store(self.done, Ordering::Relaxed);
    }

    fn stamp(&mut self, depth: usize, worker: &Worker) {
        let slots = self.disk.pages.min(depth as u64);
        let (mut begun, mut ended) = (0, 0);
        while ended < self.disk.pages {
            // The first of them take the slots in order, all others one that has come back.
            let free = if begun < slots {
                Some(begun as usize)
            } else {
                self.disk.poll().map(|done| {
                    ended += 1;
                    succeeded(&done, worker);
                    done.slot
                })
            };
            if let Some(slot) = free.filter(|_| begun < self.disk.pages) {
                let (head, body) = split(self.disk.page(slot));
                *head = stamp(begun, 0);
                fill_body(begun, body);
                self.disk.submit(slot, Kind::Write, begun);
                begun += 1;
            }
            self.disk.kick();
            worker.cpu.look();
        }
    }

    fn read(&mut self, slot: usize) {
        let page = self.random.below(self.disk.pages);
        self.disk.submit(slot, Kind::Read, page);
    }

    fn check(&mut self, done: &Done, worker: &Worker) {
        self.done += 1;
        if !succeeded(done, worker) {
            return;
        }
        let (head, body) = split(self.disk.page(done.slot));
        if let Err(seen) = check(head, done.page, 0) {
            let (page, of, intact) = (done.page, seen.page, u8::from(seen.intact));
            worker.error(format_args!(
                "disk page={page} expected=stamp got_page={of} intact={intact}"
            ));
        } else if self.done.is_multiple_of(BODY_EACH) && !body_intact(done.page, body) {
            worker.error(format_args!("disk page={} expected=body got=other", done.page));
        }
    }
}

fn succeeded(done: &Done, worker: &Worker) -> bool {
    let Done { page, status, .. } = *done;
    if status != 0 {
        worker.error(format_args!("disk page={page} expected=status=0 got={status}"));
    }
    status == 0
}
