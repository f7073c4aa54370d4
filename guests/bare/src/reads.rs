//! The disk workload: pages at random places, so many at a time, each checked, and each written before if the command
//! line says so.

use core::sync::atomic::Ordering;

use guest_core::{BareSettings, Random, body_intact, check, fill_body, stamp};

use crate::cpu;
use crate::disk::{BareDisk, BareOperation, Done, IO_ERROR};
use crate::machine::split;
use crate::plan::{BarePlan, print_line};
use crate::work::BareWorker;

/// The stamp, one cache line, is checked after each read; the body only after each of so many.
const BODY_EACH: u64 = 16;

/// A disk whose pages carry the stamps of their numbers, and the requests that are under way.
pub(crate) struct Reads {
    disk: BareDisk,
    random: Random,
    settings: BareSettings,
    /// What each slot has written last.
    generations: [u64; BareSettings::MAX_READS as usize],
    done: u64,
}

impl Reads {
    /// Stamps the disk, if it can be written and is not written later, and begins. `None` if the command line does not
    /// want it.
    pub(crate) fn begin(plan: &BarePlan, worker: &BareWorker) -> Option<Self> {
        let settings = plan.machine.settings;
        let depth = settings.reads as usize;
        if depth == 0 {
            return None;
        }
        let Some(disk) = BareDisk::find(plan.machine.virtio_devices()).filter(|disk| disk.pages > 0) else {
            print_line(
                worker.cpu,
                format_args!("fault disk expected=virtio-blk got=nothing"),
            );
            cpu::stop();
        };
        let mut reads = Self {
            disk,
            random: Random::new(cpu::tsc()),
            settings,
            generations: [0; _],
            done: 0,
        };
        if !reads.disk.read_only && !settings.writes {
            reads.stamp(depth, worker);
        }
        for slot in 0..depth {
            reads.next(slot);
        }
        reads.disk.kick();
        Some(reads)
    }

    /// Checks what came, and asks for as much again.
    pub(crate) fn turn(&mut self, worker: &BareWorker) {
        while let Some(done) = self.disk.poll() {
            match (done.kind, self.succeeded(&done, worker)) {
                (BareOperation::Write, true) => {
                    // Otherwise a read that transfers nothing would find what was written.
                    self.disk.page(done.slot).fill(0);
                    self.disk.submit(done.slot, BareOperation::Read, done.page);
                }
                (BareOperation::Read, true) => {
                    self.check(&done, worker);
                    self.next(done.slot);
                }
                (_, false) => self.next(done.slot),
            }
        }
        self.disk.kick();
        worker.cpu.reads.store(self.done, Ordering::Relaxed);
    }

    fn stamp(&mut self, depth: usize, worker: &BareWorker) {
        let slots = self.disk.pages.min(depth as u64);
        let (mut begun, mut ended) = (0, 0);
        while ended < self.disk.pages {
            // The first of them take the slots in order, all others one that has come back.
            let free = if begun < slots {
                Some(begun as usize)
            } else {
                self.disk.poll().map(|done| {
                    ended += 1;
                    self.succeeded(&done, worker);
                    done.slot
                })
            };
            if let Some(slot) = free.filter(|_| begun < self.disk.pages) {
                self.write(slot, begun);
                begun += 1;
            }
            self.disk.kick();
            worker.cpu.read_tsc();
        }
    }

    fn next(&mut self, slot: usize) {
        if self.settings.writes {
            // No other slot writes there before this one has read it.
            let slots = u64::from(self.settings.reads);
            let page = slot as u64 + slots * self.random.below((self.disk.pages / slots).max(1));
            self.generations[slot] += 1;
            self.write(slot, page);
        } else {
            let page = self.random.below(self.disk.pages);
            self.disk.submit(slot, BareOperation::Read, page);
        }
    }

    fn write(&mut self, slot: usize, page: u64) {
        let (head, body) = split(self.disk.page(slot));
        *head = stamp(page, self.generations[slot]);
        fill_body(page, body);
        self.disk.submit(slot, BareOperation::Write, page);
    }

    fn check(&mut self, done: &Done, worker: &BareWorker) {
        self.done += 1;
        let expected = self.generations[done.slot];
        let (head, body) = split(self.disk.page(done.slot));
        if let Err(seen) = check(head, done.page, expected) {
            let (page, of, got, intact) = (done.page, seen.page, seen.generation, u8::from(seen.intact));
            worker.error(format_args!(
                "disk page={page} expected={expected} got={got} got_page={of} intact={intact}"
            ));
        } else if self.done.is_multiple_of(BODY_EACH) && !body_intact(done.page, body) {
            worker.error(format_args!("disk page={} expected=body got=other", done.page));
        }
    }

    fn succeeded(&self, done: &Done, worker: &BareWorker) -> bool {
        let Done { page, status, .. } = *done;
        if status == IO_ERROR && self.settings.io_errors {
            worker.cpu.io_errors.fetch_add(1, Ordering::Relaxed);
        } else if status != 0 {
            worker.error(format_args!("disk page={page} expected=status=0 got={status}"));
        }
        status == 0
    }
}
