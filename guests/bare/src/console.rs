//! The first CPU's reports, and the commands that it reads.

use core::sync::atomic::Ordering;

use crate::cpu;
use crate::plan::{BarePlan, print_line};
use crate::serial;
use crate::work::{BareWorker, request_verification};

/// When the next report is due, and how many there were.
pub(crate) struct BareConsole {
    plan: &'static BarePlan,
    ticks: u64,
    next: u64,
}

impl BareConsole {
    /// Nothing reported yet.
    pub(crate) fn new(plan: &'static BarePlan) -> Self {
        Self {
            plan,
            ticks: 0,
            next: 0,
        }
    }

    /// Reports and reads commands if a tick is over. Returns the TSC value of the next.
    pub(crate) fn poll(&mut self, worker: &mut BareWorker, now: u64) -> u64 {
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
        let (reads, io_errors) = (
            self.plan.sum(|cpu| &cpu.reads),
            self.plan.sum(|cpu| &cpu.io_errors),
        );
        print_line(
            worker.cpu,
            format_args!(
                "tick n={n} us={us} max_gap_us={gap} pages={pages} reads={reads} io_errors={io_errors} \
                 errors={errors}"
            ),
        );
        match serial::receive() {
            Some(b'v') => self.verify(worker),
            Some(b'r') => {
                self.plan
                    .cpus()
                    .iter()
                    .for_each(|cpu| cpu.longest_gap.store(0, Ordering::Relaxed));
                print_line(worker.cpu, format_args!("reset"));
            }
            Some(b'q') => cpu::end(),
            Some(b'p') => panic_on_command(),
            Some(b't') => cpu::triple_fault(),
            _ => {}
        }
        self.next
    }

    fn verify(&self, worker: &mut BareWorker) {
        let phase = request_verification();
        worker.follow();
        worker.wait_for(|| self.plan.all_in(phase));
        let (pages, errors) = (
            self.plan.sum(|cpu| &cpu.verified),
            self.plan.sum(|cpu| &cpu.errors),
        );
        print_line(worker.cpu, format_args!("verified pages={pages} errors={errors}"));
    }
}

#[allow(
    clippy::panic,
    reason = "the command asks for it, to show what becomes of the machine"
)]
fn panic_on_command() -> ! {
    panic!()
}
