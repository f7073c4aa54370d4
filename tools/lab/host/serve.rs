//! Starts processes for the lab and carries their input, output, signals and ends.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use lab::wire::{self, LabFrame, LabFrameKind};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

/// The port to the lab, shared by all threads that send frames.
type ControlPort = Arc<Mutex<File>>;

/// A process as the lab's frames reach it.
struct HostProcess {
    stdin: Sender<Vec<u8>>,
    handle: OwnedFd,
}

/// Serves until the lab goes away.
pub(crate) fn serve() -> io::Result<()> {
    let mut from = open_port()?;
    let port = Arc::new(Mutex::new(from.try_clone()?));
    send(&port, LabFrameKind::Hello, 0, &[]);
    let mut running = HashMap::new();
    loop {
        let LabFrame { kind, process, body } = wire::read(&mut from)?;
        match kind {
            LabFrameKind::Spawn | LabFrameKind::Terminal => {
                match start(kind, &wire::split(&body), process, &port) {
                    Ok(started) => drop(running.insert(process, started)),
                    Err(error) => send(
                        &port,
                        LabFrameKind::Refused,
                        process,
                        error.to_string().as_bytes(),
                    ),
                }
            }
            LabFrameKind::Stdin => {
                if let Some(to) = running.get(&process) {
                    // Fails when the process has closed its input.
                    let _ = to.stdin.send(body);
                }
            }
            LabFrameKind::Signal => {
                let number = body.first_chunk().map_or(0, |number| i32::from_le_bytes(*number));
                if let (Some(to), Some(signal)) = (running.get(&process), Signal::from_named_raw(number)) {
                    // Fails when the process has ended.
                    let _ = pidfd_send_signal(&to.handle, signal);
                }
            }
            LabFrameKind::Hello
            | LabFrameKind::Refused
            | LabFrameKind::Stdout
            | LabFrameKind::Stderr
            | LabFrameKind::Exit => {
                println!("lab-host: a frame of the wrong direction: {kind:?}");
            }
        }
    }
}

/// The virtio-serial port named `lab`.
fn open_port() -> io::Result<File> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let path = entry?.path();
        let name = fs::read_to_string(path.join("name")).unwrap_or_default();
        if let (true, Some(device)) = (name.trim() == "lab", path.file_name()) {
            return OpenOptions::new()
                .read(true)
                .write(true)
                .open(PathBuf::from("/dev").join(device));
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "no virtio-serial port named lab",
    ))
}

/// Sends a frame. If the lab is gone, the reader ends the program.
fn send(port: &ControlPort, kind: LabFrameKind, process: u32, body: &[u8]) {
    let _ = wire::write(
        &mut *port.lock().unwrap_or_else(PoisonError::into_inner),
        kind,
        process,
        body,
    );
}

fn start(how: LabFrameKind, words: &[String], process: u32, port: &ControlPort) -> io::Result<HostProcess> {
    let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("PATH", "/bin")
        .env("HOME", "/")
        .env("TERM", "linux");
    let terminal = if how == LabFrameKind::Terminal {
        Some(attach_terminal(&mut command)?)
    } else {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        None
    };
    let mut child = command.spawn()?;
    // Keeps the terminal's other end; its output ends when the last program closes it.
    drop(command);
    let pid = Pid::from_raw(child.id() as i32).ok_or(io::ErrorKind::NotFound)?;
    let handle = pidfd_open(pid, PidfdFlags::empty())?;
    let (stdin, input) = channel();
    if let Some(to) = child.stdin.take() {
        thread::spawn(move || feed(&input, to));
    } else if let Some(terminal) = &terminal {
        let to = terminal.try_clone()?;
        thread::spawn(move || feed(&input, to));
    }
    let port = port.clone();
    thread::spawn(move || watch(child, terminal, process, &port));
    Ok(HostProcess { stdin, handle })
}

/// Gives a command a new terminal; returns this program's end of it.
fn attach_terminal(command: &mut Command) -> io::Result<File> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?;
    let name = name.to_str().map_err(io::Error::other)?;
    let theirs = OpenOptions::new().read(true).write(true).open(name)?;
    command
        .stdin(theirs.try_clone()?)
        .stdout(theirs.try_clone()?)
        .stderr(theirs);
    Ok(File::from(ours))
}

/// Writes what comes until an empty piece, or until the process no longer reads it.
fn feed(input: &Receiver<Vec<u8>>, mut to: impl Write) {
    while let Ok(bytes) = input.recv() {
        if bytes.is_empty() || to.write_all(&bytes).is_err() {
            return;
        }
    }
}

/// Carries output until both streams have ended, then sends how the process ended.
fn watch(mut child: Child, terminal: Option<File>, process: u32, port: &ControlPort) {
    let outputs = [
        terminal.map(|from| carry(from, LabFrameKind::Stdout, process, port)),
        child
            .stdout
            .take()
            .map(|from| carry(from, LabFrameKind::Stdout, process, port)),
        child
            .stderr
            .take()
            .map(|from| carry(from, LabFrameKind::Stderr, process, port)),
    ];
    let status = child.wait();
    for output in outputs.into_iter().flatten() {
        let _ = output.join();
    }
    let status = status.map_or(-1, ExitStatusExt::into_raw);
    send(port, LabFrameKind::Exit, process, &status.to_le_bytes());
}

fn carry(
    mut from: impl Read + Send + 'static,
    kind: LabFrameKind,
    process: u32,
    port: &ControlPort,
) -> thread::JoinHandle<()> {
    let port = port.clone();
    thread::spawn(move || {
        let mut buffer = vec![0; 16 << 10];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(len) => send(&port, kind, process, &buffer[..len]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    })
}
