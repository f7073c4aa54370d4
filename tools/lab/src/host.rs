//! One emulated host.

use std::io::{self, Read, Seek, SeekFrom};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};

use crate::LabError;
use crate::connection::{LabConnection, Missed};
use crate::patience::{Deadline, WaitLimit};
use crate::process::{LabOutput, LabProcess};
use crate::qemu::QemuProcess;
use crate::tsc;
use crate::wire::LabFrameKind;

/// What an error shows of a console log.
const CONSOLE_TAIL: u64 = 4096;

/// A host: programs run on it, and it can lose its power.
#[derive(Debug)]
pub struct LabHost {
    identity: Arc<Identity>,
    machine: LabMachine,
    running: Mutex<Option<RunningHost>>,
}

/// What the errors of a host's processes say of it.
#[derive(Debug)]
pub(crate) struct Identity {
    /// Its number.
    pub(crate) index: usize,
    folder: PathBuf,
}

/// What a host is made of.
#[derive(Clone, Debug)]
pub(crate) struct LabMachine {
    pub(crate) cpu: String,
    pub(crate) memory_mib: u32,
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) disk: Option<PathBuf>,
    pub(crate) port: PathBuf,
}

#[derive(Debug)]
struct RunningHost {
    connection: Arc<LabConnection>,
    _qemu: QemuProcess,
}

/// A host whose QEMU has started and that is not up yet.
#[derive(Debug)]
pub(crate) struct Starting {
    qemu: QemuProcess,
    control: UnixListener,
    deadline: Deadline,
}

impl LabHost {
    pub(crate) fn new(index: usize, folder: &Path, machine: LabMachine) -> Self {
        let identity = Arc::new(Identity {
            index,
            folder: folder.to_path_buf(),
        });
        Self {
            identity,
            machine,
            running: Mutex::default(),
        }
    }

    /// Runs a program to its end and returns what it printed. A status other than 0 is no error here.
    pub fn run(&self, words: &[&str]) -> Result<LabOutput, LabError> {
        let mut process = self.spawn(words)?;
        process.close_stdin()?;
        process.wait(WaitLimit::DEFAULT)
    }

    /// Starts a program. The first wait fails if it cannot be started.
    pub fn spawn(&self, words: &[&str]) -> Result<LabProcess, LabError> {
        LabProcess::start(
            self.connection()?,
            self.identity.clone(),
            LabFrameKind::Spawn,
            words,
        )
    }

    /// Starts a program on a terminal of its own: all that it prints is standard output.
    pub fn terminal(&self, words: &[&str]) -> Result<LabProcess, LabError> {
        let words = [&["setsid", "-c"], words].concat();
        LabProcess::start(
            self.connection()?,
            self.identity.clone(),
            LabFrameKind::Terminal,
            &words,
        )
    }

    /// Its address on the hosts' network.
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 0, self.identity.index as u8 + 1)
    }

    /// Cuts its power. Returns when nothing of it runs any more.
    pub fn kill(&self) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Starts it anew, after a power cut if it still runs. Only the shared disk keeps its content.
    pub fn restart(&self) -> Result<(), LabError> {
        self.kill();
        let starting = self.begin()?;
        self.finish(starting)
    }

    /// The end of its console log and what QEMU said.
    pub fn console(&self) -> String {
        self.identity.console()
    }

    /// Starts QEMU.
    pub(crate) fn begin(&self) -> Result<Starting, LabError> {
        let deadline = WaitLimit::DEFAULT.begin();
        let index = self.identity.index;
        let control = self.identity.path("control");
        match std::fs::remove_file(&control) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(LabError::System {
                    what: format!("remove {}", control.display()),
                    source: error,
                });
            }
            _ => {}
        }
        let listener = UnixListener::bind(&control).map_err(LabError::system("open a control channel"))?;
        let command = self.command(&control)?;
        let qemu = QemuProcess::start(command).map_err(LabError::system(format!(
            "start qemu-system-x86_64 for host {index}"
        )))?;
        Ok(Starting {
            qemu,
            control: listener,
            deadline,
        })
    }

    /// Waits until it is up.
    pub(crate) fn finish(&self, starting: Starting) -> Result<(), LabError> {
        let Starting {
            mut qemu,
            control,
            mut deadline,
        } = starting;
        let up = wait_for_client(&control, &qemu, &mut deadline)
            .and_then(|()| control.accept())
            .and_then(|(stream, _)| LabConnection::new(stream))
            .map_err(|error| error.to_string())
            .and_then(|connection| match connection.wait_until_up(&mut deadline) {
                Ok(()) => Ok(connection),
                Err(Missed::Time) => Err("silence".to_owned()),
                Err(Missed::Host) => Err("the end of QEMU".to_owned()),
            });
        match up {
            Ok(connection) => {
                let running = Some(RunningHost {
                    connection,
                    _qemu: qemu,
                });
                *self.running.lock().unwrap_or_else(PoisonError::into_inner) = running;
                Ok(())
            }
            Err(got) => {
                let got = qemu
                    .ended()
                    .map_or(got, |status| format!("QEMU's end with {status}"));
                let (host, console) = (self.identity.index, self.identity.console());
                Err(LabError::NotUp {
                    host,
                    within: WaitLimit::DEFAULT,
                    got,
                    console,
                })
            }
        }
    }

    fn connection(&self) -> Result<Arc<LabConnection>, LabError> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running
            .as_ref()
            .map(|running| running.connection.clone())
            .ok_or_else(|| self.identity.gone())
    }

    fn command(&self, control: &Path) -> Result<Command, LabError> {
        let Identity { index, .. } = *self.identity;
        let machine = &self.machine;
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-accel",
            "tcg,thread=multi",
            "-nodefaults",
            "-nographic",
            "-no-reboot",
        ]);
        command.args([
            "-cpu",
            &machine.cpu,
            "-smp",
            "1",
            "-m",
            &machine.memory_mib.to_string(),
        ]);
        command
            .arg("-kernel")
            .arg(&machine.kernel)
            .arg("-initrd")
            .arg(&machine.initramfs);
        // A one-shot timer interrupt that comes while a guest runs is sometimes lost under TCG with SVM, and then
        // that guest keeps the host's only CPU until another interrupt comes. A periodic tick survives a loss.
        command.arg("-append").arg(format!(
            "console=ttyS0 panic=-1 reboot=t mitigations=off quiet nohz=off highres=off tsc_early_khz={} lab.name=host{index} lab.address={}/24",
            tsc::khz(),
            self.address()
        ));
        let console = self.identity.path("console");
        command
            .arg("-chardev")
            .arg(format!("file,id=console,path={}", quoted(&console)));
        command.args([
            "-serial",
            "chardev:console",
            "-device",
            "virtio-rng-pci",
            "-device",
            "virtio-serial-pci",
        ]);
        command
            .arg("-chardev")
            .arg(format!("socket,id=control,server=off,path={}", quoted(control)));
        command.args(["-device", "virtserialport,chardev=control,name=lab"]);
        let port = quoted(&machine.port);
        command.arg("-netdev").arg(format!(
            "stream,id=net,server=off,addr.type=unix,addr.path={port}"
        ));
        command.arg("-device").arg(format!(
            "virtio-net-pci,netdev=net,romfile=,mac=52:54:00:00:00:{:02x}",
            index + 1
        ));
        if let Some(disk) = &machine.disk {
            // Every host writes the same image; all go through the one page cache of the machine that runs them.
            let options = "if=none,id=disk,format=raw,cache=writeback,file.locking=off";
            command
                .arg("-drive")
                .arg(format!("{options},file={}", quoted(disk)));
            command.args(["-device", "virtio-blk-pci,drive=disk,bootindex=-1"]);
        }
        let log = std::fs::File::create(self.identity.path("qemu"))
            .map_err(LabError::system("create a log for QEMU"))?;
        let copy = log
            .try_clone()
            .map_err(LabError::system("create a log for QEMU"))?;
        command.stdin(Stdio::null()).stdout(log).stderr(copy);
        Ok(command)
    }
}

impl Identity {
    /// The error of a call on a host that is not there.
    pub(crate) fn gone(&self) -> LabError {
        LabError::HostGone {
            host: self.index,
            console: self.console(),
        }
    }

    fn path(&self, kind: &str) -> PathBuf {
        self.folder.join(format!("{kind}{}", self.index))
    }

    fn console(&self) -> String {
        [tail(&self.path("console")), tail(&self.path("qemu"))].concat()
    }
}

/// The end of a log; nothing if there is none.
fn tail(path: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(CONSOLE_TAIL)))?;
        let mut bytes = Vec::new();
        file.take(CONSOLE_TAIL).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read()
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

/// A path as a value in QEMU's option lists, where a comma is doubled.
fn quoted(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// Waits until QEMU opens the channel; an error if it ends first or takes too long.
fn wait_for_client(control: &UnixListener, qemu: &QemuProcess, deadline: &mut Deadline) -> io::Result<()> {
    let process = pidfd_open(qemu.pid(), PidfdFlags::empty())?;
    let mut ready = [
        PollFd::from_borrowed_fd(control.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN),
    ];
    while let Some(left) = deadline.left() {
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        if poll(&mut ready, Some(&left))? == 0 {
            continue;
        }
        return if ready[0].revents().contains(PollFlags::IN) {
            Ok(())
        } else {
            Err(io::Error::other("the end of QEMU"))
        };
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "no control channel"))
}
