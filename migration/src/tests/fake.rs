//! The ports of a machine in memory, with faults on request.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use migration_state::Envelope;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::disk::{FakeDisk, MARK, device};
use super::guest::TestGuest;
use crate::*;

/// What a call of a port does instead of its work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum PortFault {
    Error,
    Panic,
    /// It works, but later.
    Slow(Duration),
    /// The same, the first time.
    SlowOnce(Duration),
}

/// Faults by the name of the call.
pub(super) type Faults = HashMap<&'static str, PortFault>;

/// The source's ports.
pub(super) struct FakeSource {
    pub(super) guest: TestGuest,
    pub(super) faults: Faults,
    pub(super) logging: bool,
    /// How far each vCPU is slowed down.
    pub(super) shares: Vec<f64>,
    pub(super) locked: bool,
    pub(super) disk: Option<Arc<FakeDisk>>,
    /// Pages that the guest reports as unused, if it does; but it uses the last one again at once.
    pub(super) unused: Option<Vec<u64>>,
    /// How long the guest was given for its report.
    pub(super) report_limit: Option<Duration>,
    /// Whether guest RAM can be handed over.
    pub(super) files: Option<Vec<OwnedFd>>,
    /// Page written by `save`, as a clock's page would be.
    pub(super) written_by_save: Option<u64>,
    /// Called by `pause`, to make something happen right then.
    pub(super) on_pause: Option<Box<dyn FnMut() + Send>>,
    /// The same for `resume`, once the guest runs.
    pub(super) on_resume: Option<Box<dyn FnMut() + Send>>,
    /// The same for `release`.
    pub(super) on_release: Option<Box<dyn FnMut() + Send>>,
    /// Whether its devices never finish what is in flight.
    pub(super) drain_hangs: bool,
    pub(super) calls: Vec<&'static str>,
    /// Since when a migration holds the guest.
    held_since: Option<Instant>,
    /// How long the last one did that let it run again.
    pub(super) stood_still: Option<Duration>,
    /// Reads of the disk before memory was logged.
    pub(super) reads_before_log: u64,
    /// Since when the vCPU works half of the time and waits for a CPU of the host in the other half.
    pub(super) held_up_since: Option<Instant>,
}

impl FakeSource {
    pub(super) fn new(guest: TestGuest) -> Self {
        Self {
            guest,
            faults: Faults::new(),
            logging: false,
            shares: vec![0.0],
            locked: true,
            disk: None,
            unused: None,
            report_limit: None,
            files: None,
            written_by_save: None,
            on_pause: None,
            drain_hangs: false,
            on_resume: None,
            on_release: None,
            calls: Vec::new(),
            held_since: None,
            stood_still: None,
            reads_before_log: 0,
            held_up_since: None,
        }
    }

    /// Asserts that the guest runs here as before a migration.
    pub(super) fn assert_runs(&self) {
        assert!(
            !self.guest.is_held(),
            "the guest is held; calls: {:?}",
            self.calls
        );
        self.guest.await_progress();
        assert!(!self.logging, "dirty logging is on; calls: {:?}", self.calls);
        assert!(self.locked, "the disk locks are gone");
        assert!(
            !self.disk.as_ref().is_some_and(|disk| disk.is_logged()),
            "a disk is mirrored; calls: {:?}",
            self.calls
        );
        assert!(
            self.shares.iter().all(|share| *share == 0.0),
            "throttled: {:?}",
            self.shares
        );
    }

    fn enter(&mut self, call: &'static str) -> Result<(), PortError> {
        self.calls.push(call);
        if let Some(&PortFault::SlowOnce(time)) = self.faults.get(call) {
            self.faults.insert(call, PortFault::Slow(time));
            let slow = fault(&self.faults, call);
            self.faults.remove(call);
            return slow;
        }
        fault(&self.faults, call)
    }
}

fn fault(faults: &Faults, call: &'static str) -> Result<(), PortError> {
    match faults.get(call) {
        None => Ok(()),
        Some(PortFault::Error) => Err(format!("injected into {call}").into()),
        Some(PortFault::Panic) => panic!("injected into {call}"),
        Some(PortFault::Slow(time) | PortFault::SlowOnce(time)) => {
            // Not a wait for something: the time itself is what is simulated.
            thread::sleep(*time);
            Ok(())
        }
    }
}

pub(super) fn describe(memory: &GuestMemory) -> MachineDescription {
    MachineDescription {
        memory: memory
            .iter()
            .map(|region| MemoryRegion {
                gpa: region.start_addr().0,
                len: region.len(),
            })
            .collect(),
        memory_kind: MemoryKind::Anonymous,
        cpus: 1,
        cpu_template: "none".into(),
        cpuid: vec![CpuidLeaf {
            function: 1,
            index: 0,
            registers: [1, 2, 3, 4],
        }],
        tsc_khz: 2_000_000,
        devices: Vec::new(),
    }
}

/// The bitmaps of the guest's own writes, in the place of KVM's.
struct FakeLog {
    memory: GuestMemory,
    faults: Faults,
}

impl DirtyLog for FakeLog {
    fn peek(&self, into: &mut PageSet) -> Result<(), PortError> {
        fault(&self.faults, "peek")?;
        for (index, region) in self.memory.iter().enumerate() {
            for (word, marks) in region.get_mmap().bitmap().marked() {
                into.insert_words(index, word, &[marks])?;
            }
        }
        Ok(())
    }

    fn clear(&self, region: usize, first: u64, words: &[u64]) -> Result<(), PortError> {
        fault(&self.faults, "clear")?;
        // The guest's writes wait for it.
        let pages: u32 = words.iter().map(|word| word.count_ones()).sum();
        assert!(pages <= 16384, "{pages} marks cleared at once");
        let region = self.memory.iter().nth(region).ok_or("no such region")?;
        for (at, word) in (first..).step_by(64).zip(words) {
            region.get_mmap().bitmap().clear((at / 64) as usize, *word);
        }
        Ok(())
    }

    fn by_vcpu(&self) -> Vec<u64> {
        Vec::new()
    }
}

impl Source for FakeSource {
    fn describe(&self) -> MachineDescription {
        MachineDescription {
            devices: self.disk.iter().map(|_| device()).collect(),
            ..describe(&self.guest.memory)
        }
    }

    fn mark_disks(&mut self, _: bool) -> Result<Vec<DiskMark>, PortError> {
        fault(&self.faults, "mark_disks")?;
        Ok(self.disk.iter().map(|_| MARK).collect())
    }

    fn memory(&self) -> GuestMemory {
        self.guest.memory.clone()
    }

    fn populated(&self, into: &mut PageSet) -> Result<(), PortError> {
        fault(&self.faults, "populated")?;
        for gpa in self.guest.touched() {
            into.insert_gpa(gpa)?;
        }
        Ok(())
    }

    fn has_unused(&mut self, populated: u64, _: Duration) -> Result<bool, PortError> {
        fault(&self.faults, "has_unused")?;
        assert!(populated <= self.guest.touched().len() as u64);
        Ok(self.unused.is_some())
    }

    fn unused(&mut self, at_most: Duration, into: &mut PageSet) -> Result<(), PortError> {
        self.report_limit = Some(at_most);
        for gpa in self.unused.iter().flatten() {
            self.guest.forget(*gpa);
            into.insert_gpa(*gpa)?;
        }
        if let Some(gpa) = self.unused.iter().flatten().last() {
            self.guest.write(*gpa, false);
        }
        self.enter("unused")
    }

    fn memory_files(&self) -> Option<Vec<OwnedFd>> {
        let files = self.files.as_ref()?;
        files.iter().map(|file| file.try_clone().ok()).collect()
    }

    fn mirror(&mut self, devices: &[u32]) -> Result<Vec<Arc<dyn SourceDisk>>, PortError> {
        assert_eq!(devices, [0]);
        let disk = self.disk.clone().ok_or("no disk")?;
        disk.log(true);
        self.enter("mirror")?;
        Ok(vec![disk])
    }

    fn stop_mirror(&mut self) -> Result<(), PortError> {
        self.disk.as_ref().ok_or("no disk")?.log(false);
        self.enter("stop_mirror")
    }

    fn start_dirty_log(&mut self) -> Result<Arc<dyn DirtyLog>, PortError> {
        self.logging = true;
        if let Some(disk) = &self.disk {
            self.reads_before_log = disk.reads.load(Ordering::SeqCst);
        }
        self.guest.mark_all_dirty();
        self.enter("start_dirty_log")?;
        Ok(Arc::new(FakeLog {
            memory: self.guest.memory.clone(),
            faults: self.faults.clone(),
        }))
    }

    fn stop_dirty_log(&mut self) -> Result<(), PortError> {
        self.logging = false;
        self.enter("stop_dirty_log")
    }

    fn vcpu_times(&self) -> Vec<VcpuTime> {
        let half = |since: Instant| since.elapsed() / 2;
        let time = self.held_up_since.map(half).map(|half| VcpuTime {
            ran: half,
            waited: half,
        });
        time.into_iter().collect()
    }

    fn throttle(&mut self, shares: &[f64]) -> Result<(), PortError> {
        assert!(shares.iter().all(|share| (0.0..1.0).contains(share)));
        self.shares = shares.to_vec();
        self.guest.throttle(shares[0]);
        fault(&self.faults, "throttle")
    }

    fn rehearse(&mut self) -> Result<Rehearsal, PortError> {
        assert!(!self.guest.is_held());
        self.enter("rehearse")?;
        Ok(Rehearsal {
            pause: Duration::from_micros(50),
            save: Duration::from_micros(50),
            state: Envelope::new().encode(),
        })
    }

    fn flush(&mut self) -> Result<(), PortError> {
        assert!(!self.guest.is_held());
        self.enter("flush")
    }

    fn pause(&mut self, _until: Instant) -> Result<Instant, PortError> {
        let now = Instant::now();
        self.guest.hold();
        self.held_since = Some(now);
        if let Some(on_pause) = &mut self.on_pause {
            on_pause();
        }
        self.enter("pause")?;
        Ok(now)
    }

    fn drain(&mut self, until: Instant) -> Result<(), PortError> {
        assert!(self.guest.is_held());
        if self.drain_hangs {
            thread::sleep(until.saturating_duration_since(Instant::now()));
            return Err("a disk that hangs".into());
        }
        // A device completes a request into guest memory.
        self.guest.write(PAGE_SIZE, false);
        self.enter("drain")
    }

    fn save(&mut self) -> Result<Vec<u8>, PortError> {
        self.enter("save")?;
        if let Some(gpa) = self.written_by_save {
            self.guest.write(gpa, false);
        }
        let mut envelope = Envelope::new();
        envelope.put("guest", &self.guest.registers())?;
        Ok(envelope.encode())
    }

    fn release(&mut self) -> Result<(), PortError> {
        self.enter("release")?;
        self.locked = false;
        if let Some(on_release) = &mut self.on_release {
            on_release();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), PortError> {
        self.locked = true;
        self.guest.release();
        self.stood_still = self.held_since.take().map(|since| since.elapsed());
        if let Some(on_resume) = &mut self.on_resume {
            on_resume();
        }
        self.enter("resume")
    }
}

/// The destination's ports.
#[derive(Default)]
pub(super) struct FakeDestination {
    pub(super) guest: Option<TestGuest>,
    pub(super) faults: Faults,
    pub(super) differences: Vec<Difference>,
    /// Pages that `create` forgets to build.
    pub(super) missing_pages: u64,
    /// Whether the machine's disk is here, so that none has to come.
    pub(super) has_disk: bool,
    /// Whether it wants a disk that the source does not offer.
    pub(super) greedy: bool,
    /// Whether the disk that is made takes nothing.
    pub(super) disk_breaks: bool,
    /// What writes to the disk that is made wait for.
    pub(super) disk_hangs: Option<mpsc::Receiver<()>>,
    /// The disk that was made.
    pub(super) blank: Option<Arc<FakeDisk>>,
    pub(super) running: bool,
    pub(super) stopped_at: Option<Instant>,
    pub(super) discarded: u32,
}

impl Destination for FakeDestination {
    fn check(&self, description: &MachineDescription, disks: &OfferedDisks) -> Vec<Difference> {
        let expected: Vec<_> = description.devices.iter().map(|_| MARK).collect();
        if disks.marks != expected {
            return vec![Difference {
                what: "marks".into(),
                expected: format!("{expected:?}"),
                got: format!("{:?}", disks.marks),
            }];
        }
        if let Err(error) = fault(&self.faults, "check") {
            return vec![Difference {
                what: "fault".into(),
                expected: "none".into(),
                got: error.to_string(),
            }];
        }
        self.differences.clone()
    }

    fn create(
        &mut self,
        description: &MachineDescription,
        files: Option<Vec<OwnedFd>>,
        disks: &OfferedDisks,
    ) -> Result<GuestMemory, PortError> {
        if !description.devices.is_empty() && !self.has_disk && (disks.come || self.greedy) {
            let disk = FakeDisk::new();
            disk.broken.store(self.disk_breaks, Ordering::SeqCst);
            *disk.hang.lock().unwrap() = self.disk_hangs.take();
            self.blank = Some(Arc::new(disk));
        }
        assert!(self.guest.is_none() && !self.running);
        let pages: Vec<u64> = description
            .memory
            .iter()
            .map(|region| region.len / PAGE_SIZE)
            .collect();
        let guest = match files {
            Some(files) => TestGuest::over(pages[0], pages[1], files)?,
            None => TestGuest::new(pages[0] - self.missing_pages, pages[1]),
        };
        let memory = guest.memory.clone();
        self.guest = Some(guest);
        fault(&self.faults, "create")?;
        Ok(memory)
    }

    fn blank_disks(&self) -> Vec<Arc<dyn BlankDisk>> {
        let disk = |disk: &Arc<FakeDisk>| disk.clone() as Arc<dyn BlankDisk>;
        self.blank.iter().map(disk).collect()
    }

    fn is_resident(&self) -> bool {
        false
    }

    fn rehearse(&mut self, state: &[u8]) -> Result<Duration, PortError> {
        fault(&self.faults, "rehearse")?;
        Envelope::decode(state)?.finish()?;
        let began = Instant::now();
        fault(&self.faults, "rehearse_resume")?;
        Ok(began.elapsed())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), PortError> {
        fault(&self.faults, "restore")?;
        let mut envelope = Envelope::decode(state)?;
        self.guest
            .as_ref()
            .ok_or("not built")?
            .load(envelope.take("guest")?);
        Ok(envelope.finish()?)
    }

    fn resume(&mut self, stopped_at: Instant) -> Result<(), PortError> {
        fault(&self.faults, "resume")?;
        self.stopped_at = Some(stopped_at);
        self.running = true;
        Ok(())
    }

    fn discard(&mut self) {
        assert!(!self.running);
        self.discarded += 1;
        self.guest = None;
        self.blank = None;
        let _ = fault(&self.faults, "discard");
    }
}
