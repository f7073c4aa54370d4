//! The tiny guest, booted once: a snapshot from which scenarios go on that need no boot of their own.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{Journey, Network, PATIENCE, TestHost, TinyGuest, Vm};

/// It has a card and a socket; each scenario says what they are connected to.
const GUEST: TinyGuest<'static> = TinyGuest {
    cpus: 2,
    workset_mib: 64,
    rate: "1M",
    words: "godwit.address=10.9.0.2/24",
};

/// The host's side of the guest's devices, which every process that has the guest needs.
pub struct Backends {
    /// A tap of the test's network.
    pub tap: &'static str,
    /// Where programs on the host connect to it.
    pub uds: PathBuf,
}

impl Backends {
    /// A receiver with them for the guest, and where it listens.
    pub fn receiver(&self, journey: &Journey) -> Result<(Vm, String)> {
        let [net, vsock] = &self.options();
        journey.receiver_with("tcp:127.0.0.1:0", &[net, vsock])
    }

    /// The guest out of a snapshot.
    pub fn restore(&self, host: &TestHost, directory: &Path) -> Result<Vm> {
        let [net, vsock] = &self.options();
        host.restore(directory, &["--resume", net, vsock])
    }

    fn options(&self) -> [String; 2] {
        let Self { tap, uds } = self;
        [
            format!("--net=net0={tap}"),
            format!("--vsock=uds={}", uds.display()),
        ]
    }
}

/// The guest's address.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// The guest in a VM of its own. The first test after a change of the program or the guest boots it.
pub fn tiny_guest(host: TestHost, network: &Network, backends: &Backends) -> Result<Journey> {
    let folder = host.fixtures().guests.join("saved");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    // Until the guest is restored: no other test makes it anew meanwhile.
    let lock = File::create(folder.join("lock"))?;
    lock.lock().context("the lock of the saved guest")?;
    let directory = folder.join(format!("tiny-{:016x}", identity(&host)?));
    if !directory.exists() {
        remove_others(&folder)?;
        boot(&directory)?;
    }
    let vm = backends.restore(&host, &directory)?;
    network.wait_until_forwarding(backends.tap)?;
    vm.next_tick()?;
    Ok(Journey::agent(host, vm))
}

/// A digest of the program, the guest, and how it is run.
fn identity(host: &TestHost) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    let fixtures = host.fixtures();
    for file in [
        fixtures.godwit.clone(),
        fixtures.tiny("vmlinux"),
        fixtures.tiny("initrd"),
    ] {
        let metadata = fs::metadata(&file).with_context(|| file.display().to_string())?;
        (&file, metadata.len(), metadata.mtime(), metadata.mtime_nsec()).hash(&mut hasher);
    }
    GUEST.options(host).hash(&mut hasher);
    Ok(hasher.finish())
}

fn remove_others(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            fs::remove_dir_all(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

fn boot(directory: &Path) -> Result<()> {
    let host = TestHost::new()?;
    let vsock = format!("cid=3,uds={}", host.path("vsock").display());
    let mut journey = GUEST.start(host, &["--net", "tap=tap0", "--vsock", &vsock])?;
    journey.vm.snapshot(directory, &[])?;
    journey.vm.wait_success(PATIENCE)
}
