//! vCPUs: a thread for each, its gate, its state.

mod gate;
mod kick;
mod run;
mod state;
mod throttle;
mod time;

use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use migration::VcpuTime;
use thiserror::Error;
use threads::Role;

use kick::VcpuThreads;
use throttle::Throttle;
use time::VcpuTimes;

pub use gate::{Gate, Holder};
pub use run::{Buses, VcpuFailure};
pub use state::{
    MSR_TSC_DEADLINE, MsrList, Purpose, VcpuRecord, VcpuStateError, bytes, parse, read_tsc, restore,
    restore_shared_pages, save, set_msr,
};

/// A vCPU that does not leave the guest within this time is stuck in the kernel.
const PARK_TIMEOUT: Duration = Duration::from_secs(10);

/// Until when vCPUs must be out of the guest, unless the caller sets an earlier deadline.
pub fn park_deadline() -> Instant {
    Instant::now() + PARK_TIMEOUT
}

/// vCPU threads could not be started or held.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum VcpuError {
    #[error("kick signal handler: {0}")]
    Handler(vmm_sys_util::errno::Error),
    #[error("vCPU thread {id}")]
    Spawn { id: u8, source: std::io::Error },
    #[error("throttle thread")]
    Throttle(#[source] std::io::Error),
    #[error("throttle: expected a share for each of {expected} vCPUs, got {got}")]
    Shares { expected: usize, got: usize },
    #[error("vCPUs still in the guest after {0:?}")]
    NotParked(Duration),
    #[error("expected the state of all vCPUs, got that of some: a vCPU's thread hangs or panicked")]
    Unfinished,
}

/// One vCPU's part of [`VcpuSet::with_each`].
struct VcpuWork<T> {
    vcpu: Arc<Mutex<VcpuFd>>,
    /// Whether a thread has begun with it.
    is_taken: AtomicBool,
    result: Mutex<Option<T>>,
}

impl<T> VcpuWork<T> {
    fn of(vcpu: &Arc<Mutex<VcpuFd>>) -> Self {
        Self {
            vcpu: vcpu.clone(),
            is_taken: AtomicBool::new(false),
            result: Mutex::new(None),
        }
    }
}

/// All vCPUs of a machine.
pub struct VcpuSet {
    gate: Arc<Gate>,
    vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    threads: Arc<VcpuThreads>,
    throttle: Throttle,
    times: Arc<VcpuTimes>,
    /// How many of the host's processors this process may use.
    host_cpus: usize,
}

impl VcpuSet {
    /// Starts a thread for each vCPU; all wait at the gate, which [`Holder::Startup`] holds.
    /// A vCPU that fails is reported to `on_failure`, from its thread.
    pub fn start(
        vcpus: Vec<VcpuFd>,
        buses: Buses,
        on_failure: Arc<dyn Fn(VcpuFailure) + Send + Sync>,
    ) -> Result<Self, VcpuError> {
        kick::install_handler().map_err(VcpuError::Handler)?;
        let gate = Arc::new(Gate::new(vcpus.len()));
        let vcpus: Vec<_> = vcpus.into_iter().map(|vcpu| Arc::new(Mutex::new(vcpu))).collect();
        let threads: Arc<VcpuThreads> = Arc::default();
        let kick_one = {
            let threads = threads.clone();
            Arc::new(move |id| threads.kick(id))
        };
        let set = Self {
            gate: gate.clone(),
            vcpus,
            threads,
            throttle: Throttle::new(gate.clone(), kick_one),
            times: Arc::default(),
            host_cpus: available_parallelism().map_or(1, NonZero::get),
        };
        for (id, vcpu) in (0u8..).zip(&set.vcpus) {
            let (gate, vcpu, buses, on_failure) =
                (gate.clone(), vcpu.clone(), buses.clone(), on_failure.clone());
            let (threads, times) = (set.threads.clone(), set.times.clone());
            let thread = threads::spawn(Role::Vcpu, format!("vcpu{id}"), move || {
                times.count_this_thread();
                let ran = catch_unwind(AssertUnwindSafe(|| run::run(id, &vcpu, &gate, &threads, &buses)));
                if let Err(failure) = ran.unwrap_or(Err(VcpuFailure::Panicked(id))) {
                    gate.retire();
                    on_failure(failure);
                }
            })
            .map_err(|source| VcpuError::Spawn { id, source })?;
            set.threads.push(thread);
        }
        Ok(set)
    }

    /// Closes the gate for `holder` and waits until every vCPU is out of the guest, until `until` or for
    /// [`PARK_TIMEOUT`]. If one does not come out, `holder` holds the gate no more than before. Returns the instant at
    /// which the first one was asked to leave.
    pub fn pause(&self, holder: Holder, until: Instant) -> Result<Instant, VcpuError> {
        let asked = Instant::now();
        let patience = until.saturating_duration_since(asked).min(PARK_TIMEOUT);
        if self.gate.hold(holder, || self.threads.kick_all(), patience) {
            Ok(asked)
        } else {
            Err(VcpuError::NotParked(patience))
        }
    }

    /// Opens the gate for `holder`. Without another holder, returns when the last vCPU has left the gate.
    pub fn resume(&self, holder: Holder) {
        self.gate.open(holder);
        if !self.gate.wait_entered(PARK_TIMEOUT) {
            // Not an error: the gate is open, and a caller that believes that the guest does not run could start a
            // second copy of it.
            tracing::warn!("not all vCPUs have entered the guest after {PARK_TIMEOUT:?}");
        }
    }

    /// Wakes the threads that are held, as [`VcpuSet::resume`] would, but lets none of them into the guest. Returns
    /// when each was awake.
    pub fn rouse(&self) {
        let all = self.vcpus.len();
        let nothing = Arc::new(|_| {});
        if !self
            .gate
            .do_parked(nothing, all, || {}, |pending| pending == 0, PARK_TIMEOUT)
        {
            tracing::debug!("not all vCPUs were awake within {PARK_TIMEOUT:?}");
        }
    }

    /// Does `work` with each vCPU, all of which are out of the guest, and returns the results in order of their ids.
    /// This thread takes one vCPU after the other, and so do parked vCPU threads, one for each further processor of the
    /// host. More of them would only wait for a processor, and to wake one up takes about as long as to save a vCPU.
    /// Each begins with its own vCPU, which KVM need not move to another processor then.
    pub fn with_each<T: Send + 'static>(
        &self,
        work: impl Fn(usize, &VcpuFd) -> T + Send + Sync + 'static,
    ) -> Result<Vec<T>, VcpuError> {
        let states: Arc<Vec<VcpuWork<T>>> = Arc::new(self.vcpus.iter().map(VcpuWork::of).collect());
        let left = Arc::new(AtomicUsize::new(states.len()));
        let task = {
            let (states, left) = (states.clone(), left.clone());
            Arc::new(move |first: usize| {
                let (before, after) = states.split_at(first.min(states.len()));
                for (id, state) in (first..).zip(after).chain((0..).zip(before)) {
                    if !state.is_taken.swap(true, Ordering::SeqCst) {
                        let result = work(id, &lock_vcpu(&state.vcpu));
                        *state.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
                        left.fetch_sub(1, Ordering::SeqCst);
                    }
                }
            })
        };
        let helpers = self.host_cpus.min(states.len()).saturating_sub(1);
        let share = {
            let task = task.clone();
            move || task(0)
        };
        let is_done = |_| left.load(Ordering::SeqCst) == 0;
        let done = self.gate.do_parked(task, helpers, share, is_done, PARK_TIMEOUT);
        let taken = |state: &VcpuWork<T>| state.result.lock().unwrap_or_else(PoisonError::into_inner).take();
        let results: Option<Vec<T>> = states.iter().map(taken).collect();
        results.filter(|_| done).ok_or(VcpuError::Unfinished)
    }

    /// What each vCPU's thread has got of the host's CPUs so far, in the same order each time; empty where the host does not
    /// say.
    pub fn times(&self) -> Vec<VcpuTime> {
        self.times.read()
    }

    /// Number of vCPUs.
    pub fn count(&self) -> usize {
        self.vcpus.len()
    }

    /// The gate, which knows its holders.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The vCPUs in order of their ids. Blocks while they run: pause first.
    pub fn lock_all(&self) -> Vec<MutexGuard<'_, VcpuFd>> {
        self.vcpus.iter().map(|vcpu| lock_vcpu(vcpu)).collect()
    }

    /// The vCPUs that are not in the guest. Does not block.
    pub fn lock_parked(&self) -> Vec<MutexGuard<'_, VcpuFd>> {
        self.vcpus
            .iter()
            .filter_map(|vcpu| match vcpu.try_lock() {
                Ok(vcpu) => Some(vcpu),
                Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            })
            .collect()
    }

    /// From now on keeps each vCPU out of the guest for a share of the time, 0 to 1, in slices of at most 10
    /// ms. Does not open the gate. Returns at once.
    pub fn throttle(&self, shares: &[f64]) -> Result<(), VcpuError> {
        if shares.len() != self.vcpus.len() {
            return Err(VcpuError::Shares {
                expected: self.vcpus.len(),
                got: shares.len(),
            });
        }
        self.throttle.set(shares)
    }
}

fn lock_vcpu(vcpu: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        self.gate.end();
        self.threads.kick_all();
        for thread in self.threads.take() {
            // A panic in a vCPU thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::path::Path;
    use std::thread;

    use devices::bus::Bus;
    use kvm_ioctls::Kvm;

    use super::*;

    /// So many vCPUs, parked. None is the first of its machine, so that in the guest they wait for an interrupt that
    /// starts them. `None` without KVM.
    pub(super) fn vcpus_that_wait(count: u64) -> Option<VcpuSet> {
        if !Path::new("/dev/kvm").exists() {
            return None;
        }
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpus = (1..=count).map(|id| vm.create_vcpu(id).unwrap()).collect();
        let bus = Arc::new(Bus::new());
        let buses = Buses {
            pio: bus.clone(),
            mmio: bus,
            rings: None,
        };
        let set = VcpuSet::start(vcpus, buses, Arc::new(|failure| panic!("{failure}"))).unwrap();
        assert!(set.gate().wait_parked(PARK_TIMEOUT));
        Some(set)
    }

    #[test]
    fn each_parked_vcpu_is_worked_on_once_by_no_more_threads_than_there_are_processors() {
        let Some(set) = vcpus_that_wait(16) else { return };
        for _ in 0..100 {
            let (ids, threads): (Vec<_>, HashSet<_>) = set
                .with_each(|id, _| (id, thread::current().id()))
                .unwrap()
                .into_iter()
                .unzip();
            assert!(ids.into_iter().eq(0..16));
            assert!(threads.len() <= set.host_cpus);
        }
    }
}
