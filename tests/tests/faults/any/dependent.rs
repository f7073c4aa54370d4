//! Guests that need something outside, which can go.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use tests::{BareGuest, Journey, PATIENCE, TestHost, TestProcess};

use super::harm::kill;

const DISK_BYTES: u64 = 4 << 20;

/// What a guest needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thing {
    /// The program that fills its pages, which is killed.
    Handler,
    /// The file that its memory is mapped from, which shrinks.
    Memory,
    /// The image of its disk, which shrinks.
    Disk,
}

impl Thing {
    /// The error of a VM that ends because the thing has gone; none for what it goes on without.
    pub(super) fn gone(self) -> Option<&'static str> {
        match self {
            Self::Handler => Some("the page-fault handler has hung up"),
            Self::Memory => Some("a page of the guest's memory is lost"),
            Self::Disk => None,
        }
    }
}

/// A guest, and what it needs.
pub(super) struct Dependent {
    pub(super) journey: Journey,
    /// More options of the process that receives the guest.
    pub(super) receiver: Vec<String>,
    /// Takes away what it needs.
    pub(super) lose: Box<dyn FnOnce() + Send>,
    /// Its disk, if that is it.
    pub(super) disk: Option<DependentDisk>,
    /// Ends with this.
    pub(super) handler: Option<TestProcess>,
}

impl Dependent {
    /// A guest that nothing outside can harm.
    pub(super) fn on_nothing(journey: Journey) -> Self {
        Self {
            journey,
            receiver: Vec::new(),
            lose: Box::new(|| ()),
            disk: None,
            handler: None,
        }
    }

    /// A new guest that needs something.
    pub(super) fn on(thing: Thing) -> Result<Self> {
        match thing {
            Thing::Handler => Self::on_handler(),
            Thing::Memory => Self::on_memory(),
            Thing::Disk => Self::on_disk(),
        }
    }

    fn on_handler() -> Result<Self> {
        let (mut journey, directory) = in_files()?;
        let [memory, socket] = ["memory-elsewhere", "handler"].map(|name| journey.host.path(name));
        std::fs::rename(directory.join("memory"), &memory)?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_fault-handler"));
        command.args([&memory, &socket]);
        let handler = TestProcess::spawn(command)?;
        let listens = |line: &str| (line == "listening").then_some(());
        handler.stdout().wait("the handler", 0, PATIENCE, listens)?;
        let socket = socket.display().to_string();
        let restored = journey
            .host
            .restore(&directory, &["--resume", "--uffd", &socket])?;
        journey.arrive(restored)?;
        let id = handler.id();
        Ok(Self {
            lose: Box::new(move || kill(id)),
            handler: Some(handler),
            ..Self::on_nothing(journey)
        })
    }

    fn on_memory() -> Result<Self> {
        let (mut journey, directory) = in_files()?;
        let restored = journey.host.restore(&directory, &["--resume"])?;
        journey.arrive(restored)?;
        let memory = directory.join("memory");
        Ok(Self {
            lose: Box::new(move || halve(&memory)),
            ..Self::on_nothing(journey)
        })
    }

    fn on_disk() -> Result<Self> {
        let host = TestHost::new()?;
        let image = host.path("disk");
        File::create(&image)?.set_len(DISK_BYTES)?;
        let guest = BareGuest {
            reads: 8,
            io_errors: true,
            ..Default::default()
        };
        let disk = format!("id=d,path={}", image.display());
        let journey = Journey::start(host, &guest, &["--disk", &disk])?;
        // The guest has written all of the disk by now, and only reads.
        let content = std::fs::read(&image)?;
        let lost = image.clone();
        Ok(Self {
            receiver: vec![format!("--disk=d={}", image.display())],
            lose: Box::new(move || halve(&lost)),
            disk: Some(DependentDisk { image, content }),
            ..Self::on_nothing(journey)
        })
    }
}

/// A disk whose image may have shrunk.
pub(super) struct DependentDisk {
    image: PathBuf,
    content: Vec<u8>,
}

impl DependentDisk {
    /// Restores the image's content.
    pub(super) fn mend(&self) -> Result<()> {
        let image = File::options().write(true).open(&self.image)?;
        Ok(image.write_all_at(&self.content, 0)?)
    }
}

/// A guest that lies in files.
fn in_files() -> Result<(Journey, PathBuf)> {
    let journey = super::begin()?;
    let directory = journey.host.path("saved");
    journey.vm.snapshot(&directory, &[])?;
    Ok((journey, directory))
}

fn halve(path: &PathBuf) {
    let halved = File::options()
        .write(true)
        .open(path)
        .and_then(|file| file.set_len(file.metadata()?.len() / 2));
    if let Err(error) = halved {
        // The proxy's thread can only print the error. The test then fails because the guest misses nothing.
        eprintln!("{}: {error}", path.display());
    }
}
