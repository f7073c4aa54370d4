//! What the CPUs do: fill, dirty at a pace, verify, report. `first_cpu` also talks.

#![allow(unsafe_code, reason = "each CPU reads and writes the pages of its own shares")]

use core::fmt::Write;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use guest_core::{PAGE, Pace, Settings, Share, body_intact, check, fill_body, stamp};

use crate::cpu;
use crate::machine::{Machine, page, split};
use crate::once::Once;
use crate::serial::{self, Line};

/// Errors that are printed; all are counted.
const PRINTED_ERRORS: u64 = 20;
/// Milliseconds that another CPU gets to come up.
const START_MS: u64 = 2000;

/// A CPU's phases; every verification adds one.
const ONLINE: u32 = 1;
const FILLED: u32 = 2;

/// What a CPU tells the others.
struct Cpu {
    phase: AtomicU32,
    pages: AtomicU64,
    errors: AtomicU64,
    verified: AtomicU64,
    /// In TSC ticks.
    longest_gap: AtomicU64,
    last_look: AtomicU64,
    /// By how many ticks the TSC went backwards, until it is reported.
    backwards: AtomicU64,
}

impl Cpu {
    const fn new() -> Self {
        Self {
            phase: AtomicU32::new(0),
            pages: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            verified: AtomicU64::new(0),
            longest_gap: AtomicU64::new(0),
            last_look: AtomicU64::new(0),
            backwards: AtomicU64::new(0),
        }
    }

    /// Looks at the TSC and keeps the longest time between two looks.
    fn look(&self) -> u64 {
        let now = cpu::tsc();
        let last = self.last_look.swap(now, Ordering::Relaxed);
        if now < last {
            self.backwards.store(last - now, Ordering::Relaxed);
        } else if last != 0 && now - last > self.longest_gap.load(Ordering::Relaxed) {
            self.longest_gap.store(now - last, Ordering::Relaxed);
        }
        now
    }
}

static CPUS: [Cpu; Settings::MAX_CPUS as usize] = [const { Cpu::new() }; Settings::MAX_CPUS as usize];
static PLAN: Once<Plan> = Once::new();
static READY: AtomicBool = AtomicBool::new(false);
static WANTED_PHASE: AtomicU32 = AtomicU32::new(FILLED);

/// What all CPUs share and none changes.
struct Plan {
    machine: Machine,
    workset: Share,
    rest: Share,
    tsc_khz: u64,
    apic_ticks_per_ms: u32,
    start: u64,
}

impl Plan {
    fn new(machine: Machine) -> Self {
        let (tsc, apic) = cpu::compare_clocks();
        // Every VMM of the kind runs the APIC timer at 1 GHz; so it measures the TSC if nobody told.
        let tsc_khz = machine
            .settings
            .tsc_khz
            .unwrap_or(tsc.saturating_mul(1_000_000) / apic.max(1))
            .max(1);
        let apic_ticks_per_ms = (apic.saturating_mul(tsc_khz) / tsc.max(1)) as u32;
        let all = machine.ranges.pages();
        let count = machine
            .settings
            .workset
            .map_or(all, |bytes| bytes / PAGE)
            .min(all);
        let rest = if machine.settings.fill { all - count } else { 0 };
        Self {
            machine,
            workset: Share { first: 0, count },
            rest: Share {
                first: count,
                count: rest,
            },
            tsc_khz,
            apic_ticks_per_ms,
            start: cpu::tsc(),
        }
    }

    fn cpus(&self) -> &'static [Cpu] {
        &CPUS[..self.machine.settings.cpus as usize]
    }

    fn us(&self, ticks: u64) -> u64 {
        ticks / self.tsc_khz * 1000 + ticks % self.tsc_khz * 1000 / self.tsc_khz
    }

    fn sum(&self, field: impl Fn(&Cpu) -> &AtomicU64) -> u64 {
        self.cpus()
            .iter()
            .map(|cpu| field(cpu).load(Ordering::Relaxed))
            .sum()
    }

    fn longest_gap(&self) -> u64 {
        self.cpus()
            .iter()
            .map(|cpu| cpu.longest_gap.load(Ordering::Relaxed))
            .max()
            .unwrap_or(0)
    }

    /// Whether all CPUs have come to a phase.
    fn all_in(&self, phase: u32) -> bool {
        self.cpus()
            .iter()
            .all(|cpu| cpu.phase.load(Ordering::Acquire) >= phase)
    }
}

/// The work of the CPU that the machine started on.
pub(crate) fn first_cpu(machine: Machine) -> ! {
    cpu::set_up_apic();
    PLAN.set(Plan::new(machine));
    let Some(plan) = PLAN.get() else { cpu::stop() };
    for other in 1..plan.machine.settings.cpus {
        if !start_other(plan, other) {
            say(
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
    say(
        &CPUS[0],
        format_args!("start cpus={cpus} pages={pages} workset_pages={workset} tsc_khz={khz}"),
    );
    let mut worker = Worker::new(plan, 0);
    worker.fill();
    worker.wait_for(|| plan.all_in(FILLED));
    plan.cpus()
        .iter()
        .for_each(|cpu| cpu.longest_gap.store(0, Ordering::Relaxed));
    say(&CPUS[0], format_args!("ready"));
    READY.store(true, Ordering::Release);
    let mut console = Console {
        plan,
        ticks: 0,
        next: 0,
    };
    worker.run(|worker, now| console.poll(worker, now))
}

/// The work of any other CPU.
pub(crate) fn other_cpu(index: u32) -> ! {
    let Some(plan) = PLAN.get() else { cpu::stop() };
    let mut worker = Worker::new(plan, index);
    cpu::set_up_apic();
    worker.cpu.phase.store(ONLINE, Ordering::Release);
    worker.fill();
    worker.wait_for(|| READY.load(Ordering::Acquire));
    worker.run(|_, now| now.wrapping_add(plan.tsc_khz))
}

fn start_other(plan: &Plan, other: u32) -> bool {
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

/// Prints a line; `cpu` is the one that runs this.
fn say(cpu: &Cpu, text: core::fmt::Arguments<'_>) {
    let mut line = Line::new();
    let _ = line.write_fmt(text);
    line.print(|| {
        cpu.look();
    });
}

/// One CPU and the pages that are its own.
struct Worker {
    plan: &'static Plan,
    index: u32,
    cpu: &'static Cpu,
    own: Share,
    rest: Share,
    /// The next page of the sweep, counted from `own.first`.
    position: u64,
    /// What the pages from there on hold; those before hold the next one.
    generation: u64,
}

impl Worker {
    fn new(plan: &'static Plan, index: u32) -> Self {
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
                if number % Pace::BATCH == 0 {
                    self.cpu.look();
                }
            }
        }
        self.cpu.phase.store(FILLED, Ordering::Release);
    }

    /// Works for ever. `poll` is called at every look at the clock and tells when it wants to be called again.
    fn run(&mut self, mut poll: impl FnMut(&mut Self, u64) -> u64) -> ! {
        let settings = self.plan.machine.settings;
        let mut pace = Pace::new(settings.rate, settings.cpus, self.plan.tsc_khz, self.cpu.look());
        loop {
            let now = self.cpu.look();
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

    fn wait_for(&mut self, done: impl Fn() -> bool) {
        while !done() {
            self.cpu.look();
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

    /// Verifies if somebody asked for it since the last time; reports a TSC that went backwards.
    fn follow(&mut self) {
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
                if offset % Pace::BATCH == 0 {
                    self.cpu.look();
                }
            }
        }
        self.cpu.verified.store(pages, Ordering::Relaxed);
    }

    fn error(&self, what: core::fmt::Arguments<'_>) {
        if self.cpu.errors.fetch_add(1, Ordering::Relaxed) < PRINTED_ERRORS {
            say(self.cpu, format_args!("error {what}"));
        }
    }
}

/// The first CPU's reports and its ear for commands.
struct Console {
    plan: &'static Plan,
    ticks: u64,
    next: u64,
}

impl Console {
    /// Reports and listens if a tick is over. Returns the TSC value of the next.
    fn poll(&mut self, worker: &mut Worker, now: u64) -> u64 {
        if now < self.next {
            return self.next;
        }
        let tick = self.plan.machine.settings.tick_ms * self.plan.tsc_khz;
        self.next = if self.next + tick > now {
            self.next + tick
        } else {
            now + tick
        };
        self.ticks += 1;
        let (n, us) = (self.ticks, self.plan.us(now.saturating_sub(self.plan.start)));
        let gap = self.plan.us(self.plan.longest_gap());
        let (pages, errors) = (self.plan.sum(|cpu| &cpu.pages), self.plan.sum(|cpu| &cpu.errors));
        say(
            worker.cpu,
            format_args!("tick n={n} us={us} max_gap_us={gap} pages={pages} errors={errors}"),
        );
        match serial::receive() {
            Some(b'v') => self.verify(worker),
            Some(b'r') => {
                self.plan
                    .cpus()
                    .iter()
                    .for_each(|cpu| cpu.longest_gap.store(0, Ordering::Relaxed));
                say(worker.cpu, format_args!("reset"));
            }
            Some(b'q') => cpu::end(),
            _ => {}
        }
        self.next
    }

    fn verify(&self, worker: &mut Worker) {
        let phase = WANTED_PHASE.fetch_add(1, Ordering::AcqRel) + 1;
        worker.follow();
        worker.wait_for(|| self.plan.all_in(phase));
        let (pages, errors) = (
            self.plan.sum(|cpu| &cpu.verified),
            self.plan.sum(|cpu| &cpu.errors),
        );
        say(worker.cpu, format_args!("verified pages={pages} errors={errors}"));
    }
}
