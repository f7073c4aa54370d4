//! What the CPUs do: come up, fill, dirty at a pace, verify.

#![allow(unsafe_code, reason = "each CPU reads and writes the pages of its own shares")]

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use guest_core::{DirtyPace, Share, body_intact, check, fill_body, stamp};

use crate::balloon::BareBalloon;
use crate::console::BareConsole;
use crate::cpu;
use crate::machine::{BareMachine, page, split};
use crate::once::Once;
use crate::plan::{BarePlan, CPUS, Cpu, FILLED, ONLINE, print_line};
use crate::reads::Reads;

/// Errors that are printed; all are counted.
const PRINTED_ERRORS: u64 = 20;
/// Milliseconds that another CPU gets to come up.
const START_MS: u64 = 2000;

static PLAN: Once<BarePlan> = Once::new();
static READY: AtomicBool = AtomicBool::new(false);
static WANTED_PHASE: AtomicU32 = AtomicU32::new(FILLED);

/// The work of the CPU that the machine started on.
pub(crate) fn first_cpu(machine: BareMachine) -> ! {
    cpu::set_up_apic();
    PLAN.set(BarePlan::new(machine));
    let Some(plan) = PLAN.get() else { cpu::stop() };
    for other in 1..plan.machine.settings.cpus {
        if !start_other(plan, other) {
            print_line(
                &CPUS[0],
                format_args!("fault cpu={other} expected=online got=nothing"),
            );
            cpu::stop();
        }
    }
    let (cpus, pages, workset) = (
        plan.machine.settings.cpus,
        plan.machine.ranges.pages(),
        plan.workset.count,
    );
    let khz = plan.tsc_khz;
    print_line(
        &CPUS[0],
        format_args!("start cpus={cpus} pages={pages} workset_pages={workset} tsc_khz={khz}"),
    );
    let mut worker = BareWorker::new(plan, 0);
    worker.fill();
    worker.wait_for(|| plan.all_in(FILLED));
    let mut reads = Reads::begin(plan, &worker);
    let mut balloon = BareBalloon::find(plan);
    plan.cpus()
        .iter()
        .for_each(|cpu| cpu.longest_gap.store(0, Ordering::Relaxed));
    print_line(&CPUS[0], format_args!("ready"));
    READY.store(true, Ordering::Release);
    let mut console = BareConsole::new(plan);
    worker.run(|worker, now| {
        let next = console.poll(worker, now);
        if let Some(balloon) = &mut balloon {
            balloon.turn(worker);
        }
        let Some(reads) = &mut reads else { return next };
        reads.turn(worker);
        // Polled: there is always something to check.
        now
    })
}

/// The work of any other CPU.
pub(crate) fn other_cpu(index: u32) -> ! {
    let Some(plan) = PLAN.get() else { cpu::stop() };
    let mut worker = BareWorker::new(plan, index);
    cpu::set_up_apic();
    worker.cpu.phase.store(ONLINE, Ordering::Release);
    worker.fill();
    worker.wait_for(|| READY.load(Ordering::Acquire));
    worker.run(|_, now| now.wrapping_add(plan.tsc_khz))
}

/// Asks every CPU to verify its shares; returns the phase that each has come to when it is done.
pub(crate) fn request_verification() -> u32 {
    WANTED_PHASE.fetch_add(1, Ordering::AcqRel) + 1
}

fn start_other(plan: &BarePlan, other: u32) -> bool {
    let wait = |ms: u64, done: &dyn Fn() -> bool| {
        let from = cpu::tsc();
        while !done() && cpu::tsc().saturating_sub(from) < ms * plan.tsc_khz {
            core::hint::spin_loop();
        }
        done()
    };
    cpu::start_other(other, || {
        wait(10, &|| false);
    });
    wait(START_MS, &|| {
        CPUS[other as usize].phase.load(Ordering::Acquire) >= ONLINE
    })
}

/// One CPU and the pages that are its own.
pub(crate) struct BareWorker {
    plan: &'static BarePlan,
    index: u32,
    pub(crate) cpu: &'static Cpu,
    own: Share,
    rest: Share,
    /// The next page of the sweep, counted from `own.first`.
    position: u64,
    /// What the pages from there on hold; those before hold the next one.
    generation: u64,
}

impl BareWorker {
    fn new(plan: &'static BarePlan, index: u32) -> Self {
        let cpus = plan.machine.settings.cpus;
        Self {
            plan,
            index,
            cpu: &CPUS[index as usize],
            own: plan.workset.part(index, cpus),
            rest: plan.rest.part(index, cpus),
            position: 0,
            generation: 0,
        }
    }

    fn fill(&mut self) {
        for share in [self.own, self.rest] {
            for number in share.first..share.first + share.count {
                // SAFETY: the page is in this CPU's share.
                let Some(words) = (unsafe { page(&self.plan.machine.ranges, number) }) else {
                    continue;
                };
                let (head, body) = split(words);
                *head = stamp(number, 0);
                fill_body(number, body);
                if number % DirtyPace::BATCH == 0 {
                    self.cpu.read_tsc();
                }
            }
        }
        self.cpu.phase.store(FILLED, Ordering::Release);
    }

    /// Works for ever. `poll` is called whenever the clock is read and returns when it is to be called again.
    fn run(&mut self, mut poll: impl FnMut(&mut Self, u64) -> u64) -> ! {
        let settings = self.plan.machine.settings;
        let mut pace = DirtyPace::new(
            settings.rate,
            settings.cpus,
            self.plan.tsc_khz,
            self.cpu.read_tsc(),
        );
        loop {
            let now = self.cpu.read_tsc();
            let due = if self.own.count == 0 { 0 } else { pace.due(now) };
            for _ in 0..due {
                self.dirty_next();
            }
            self.cpu.pages.fetch_add(due, Ordering::Relaxed);
            self.follow();
            let next = poll(self, now);
            if due == 0 {
                self.idle(next.saturating_sub(cpu::tsc()));
            }
        }
    }

    /// Waits a millisecond, or less if `ticks` of the TSC are less.
    fn idle(&self, ticks: u64) {
        if self.plan.machine.settings.spin || ticks == 0 {
            core::hint::spin_loop();
        } else {
            let khz = self.plan.tsc_khz;
            cpu::wait((ticks.min(khz) * u64::from(self.plan.apic_ticks_per_ms) / khz) as u32);
        }
    }

    pub(crate) fn wait_for(&mut self, done: impl Fn() -> bool) {
        while !done() {
            self.cpu.read_tsc();
            self.idle(self.plan.tsc_khz);
        }
    }

    /// Checks the next page of the sweep and gives it the next generation.
    fn dirty_next(&mut self) {
        let number = self.own.first + self.position;
        // SAFETY: the page is in this CPU's share.
        let Some(words) = (unsafe { page(&self.plan.machine.ranges, number) }) else {
            return;
        };
        let (head, _) = split(words);
        let seen = check(head, number, self.generation);
        *head = stamp(number, self.generation + 1);
        if let Err(seen) = seen {
            let (expected, got, of) = (self.generation, seen.generation, seen.page);
            self.error(format_args!(
                "page={number} expected={expected} got={got} got_page={of} intact={}",
                u8::from(seen.intact)
            ));
        }
        self.position += 1;
        if self.position == self.own.count {
            self.position = 0;
            self.generation += 1;
        }
    }

    /// Verifies if a command asked for it since the last time; reports a TSC that went backwards.
    pub(crate) fn follow(&mut self) {
        let wanted = WANTED_PHASE.load(Ordering::Acquire);
        if self.cpu.phase.load(Ordering::Relaxed) < wanted {
            self.verify();
            self.cpu.phase.store(wanted, Ordering::Release);
        }
        let backwards = self.cpu.backwards.swap(0, Ordering::Relaxed);
        if backwards != 0 {
            let index = self.index;
            self.error(format_args!("cpu={index} tsc_backwards={backwards}"));
        }
    }

    fn verify(&mut self) {
        let mut pages = 0;
        for (share, sweep) in [(self.own, true), (self.rest, false)] {
            for offset in 0..share.count {
                let number = share.first + offset;
                let generation = if sweep {
                    self.generation + u64::from(offset < self.position)
                } else {
                    0
                };
                // SAFETY: the page is in this CPU's share.
                let Some(words) = (unsafe { page(&self.plan.machine.ranges, number) }) else {
                    continue;
                };
                let (head, body) = split(words);
                if let Err(seen) = check(head, number, generation) {
                    let (got, of) = (seen.generation, seen.page);
                    self.error(format_args!(
                        "page={number} expected={generation} got={got} got_page={of}"
                    ));
                } else if !body_intact(number, body) {
                    self.error(format_args!("page={number} expected=body got=other"));
                }
                pages += 1;
                if offset % DirtyPace::BATCH == 0 {
                    self.cpu.read_tsc();
                }
            }
        }
        self.cpu.verified.store(pages, Ordering::Relaxed);
    }

    /// Up to `count` pages that are not swept any more, nor verified: the last ones.
    pub(crate) fn give_up(&mut self, count: u64) -> Share {
        let count = count.min(self.rest.count);
        self.rest.count -= count;
        self.given_up(count)
    }

    /// Of those that were given up the `count` that come first.
    pub(crate) fn given_up(&self, count: u64) -> Share {
        Share {
            first: self.rest.first + self.rest.count,
            count,
        }
    }

    /// Stamps them again. Returns how many of them were zero.
    pub(crate) fn take_back(&mut self, share: Share) -> u64 {
        let mut zero = 0;
        for number in share.first..share.first + share.count {
            // SAFETY: the page is in this CPU's share.
            let Some(words) = (unsafe { page(&self.plan.machine.ranges, number) }) else {
                continue;
            };
            zero += u64::from(words.iter().all(|word| *word == 0));
            let (head, body) = split(words);
            *head = stamp(number, 0);
            fill_body(number, body);
        }
        self.rest.count += share.count;
        self.cpu.read_tsc();
        zero
    }

    /// Counts an error, and prints it if there were not too many.
    pub(crate) fn error(&self, what: core::fmt::Arguments<'_>) {
        if self.cpu.errors.fetch_add(1, Ordering::Relaxed) < PRINTED_ERRORS {
            print_line(self.cpu, format_args!("error {what}"));
        }
    }
}
