//! Devices as vCPUs meet them while the machine does something with what backs them.

use std::os::fd::BorrowedFd;
use std::sync::Barrier;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use devices::Limits;
use devices::virtio::rng::VirtioRng;
use devices::virtio::{Description, DeviceError, QueueError, QueueProgress, Queues};
use kvm_ioctls::Kvm;
use migration::MemoryKind;

use super::*;
use crate::memory;

/// As slow as a disk with much to write back: each call takes until both of the barrier's sides are there twice.
struct Slow(Barrier);

impl HostBackend for Slow {
    fn take_locks(&self) -> Result<(), HostError> {
        self.flush()
    }

    fn release_locks(&self) -> Result<(), HostError> {
        self.flush()
    }

    fn flush(&self) -> Result<(), HostError> {
        self.0.wait();
        self.0.wait();
        Ok(())
    }

    fn invalidate(&self) -> Result<(), HostError> {
        self.flush()
    }
}

/// An entropy device with something behind it.
struct OnSlow(VirtioRng, Arc<Slow>);

impl VirtioDevice for OnSlow {
    fn device_type(&self) -> u32 {
        self.0.device_type()
    }
    fn features(&self) -> u64 {
        self.0.features()
    }
    fn queue_sizes(&self) -> &[u16] {
        self.0.queue_sizes()
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.0.read_config(offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.0.write_config(offset, data);
    }
    fn activate(&mut self, features: u64) {
        self.0.activate(features);
    }
    fn process_queue(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        self.0.process_queue(index, queues)
    }
    fn host_events(&self) -> Vec<BorrowedFd<'_>> {
        self.0.host_events()
    }
    fn process_host(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        self.0.process_host(queues)
    }
    fn reset(&mut self) -> bool {
        self.0.reset()
    }
    fn drain(&mut self, queues: &mut Queues<'_>, until: Instant) -> Result<(), DeviceError> {
        self.0.drain(queues, until)
    }
    fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        self.0.save(envelope, instance)
    }
    fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        self.0.restore(envelope, instance)
    }
    fn describe(&self) -> Description {
        self.0.describe()
    }
    fn host_backend(&self) -> Option<Arc<dyn HostBackend>> {
        Some(self.1.clone())
    }
    fn metrics(&self) -> Arc<dyn Counters> {
        self.0.metrics()
    }
}

#[test]
fn no_vcpu_waits_for_a_backend() {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let memory = memory::create(&[(0, 2 << 20)], MemoryKind::Anonymous).unwrap();
    let slow = Arc::new(Slow(Barrier::new(2)));
    let named = NamedDevice {
        id: "rng".into(),
        device: Box::new(OnSlow(VirtioRng::new(Limits::default()).unwrap(), slow.clone())),
        balloon: None,
        terminal: None,
        disk: None,
    };
    let console = Console::detached();
    let set = DeviceSet::build(&vm, &memory, vec![named], &console, Arc::new(|_| {})).unwrap();
    type Call = fn(&DeviceSet) -> Result<(), MachineError>;
    let calls: [(&str, Call); 4] = [
        ("flush", DeviceSet::flush),
        ("locks", DeviceSet::take_locks),
        ("invalidate", DeviceSet::invalidate),
        ("release", DeviceSet::release_locks),
    ];
    for (what, call) in calls {
        std::thread::scope(|scope| {
            scope.spawn(|| call(&set).unwrap());
            slow.0.wait();
            // As a vCPU does in an interrupt handler.
            let (done, is_done) = mpsc::channel();
            let mmio = set.mmio.clone();
            std::thread::spawn(move || {
                let mut status = [0xff; 4];
                mmio.read(layout::VIRTIO_MMIO + 0x60, &mut status);
                let _ = done.send(status);
            });
            let read = is_done.recv_timeout(Duration::from_secs(5));
            slow.0.wait();
            assert_eq!(read, Ok([0; 4]), "{what}");
        });
    }
}
