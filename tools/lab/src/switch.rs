//! A learning Ethernet switch between the hosts: one Unix socket per port, as QEMU's `-netdev stream` speaks
//! (each frame after its length, 4 bytes, big endian).

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Longest frame: a jumbo one that QEMU may build from segments.
const LONGEST: usize = 68 << 10;
/// Frames that wait for a slow port; more are dropped, as a switch does.
const QUEUE: usize = 1024;

type Mac = [u8; 6];

/// The switch; it stops when it is dropped.
#[derive(Debug)]
pub(crate) struct Switch {
    shared: Arc<SwitchShared>,
    paths: Vec<PathBuf>,
}

#[derive(Debug)]
struct SwitchShared {
    ports: Vec<SwitchPort>,
    learnt: Mutex<HashMap<Mac, usize>>,
    stopped: AtomicBool,
}

#[derive(Debug, Default)]
struct SwitchPort {
    cut: AtomicBool,
    queue: Mutex<Option<SyncSender<Arc<[u8]>>>>,
}

impl Switch {
    /// Opens `ports` ports with sockets in `folder`.
    pub(crate) fn start(folder: &Path, ports: usize) -> io::Result<Self> {
        let shared = Arc::new(SwitchShared {
            ports: (0..ports).map(|_| SwitchPort::default()).collect(),
            learnt: Mutex::default(),
            stopped: AtomicBool::new(false),
        });
        let mut switch = Self {
            shared,
            paths: Vec::new(),
        };
        for port in 0..ports {
            let path = folder.join(format!("port{port}"));
            let listener = UnixListener::bind(&path)?;
            switch.paths.push(path);
            let shared = switch.shared.clone();
            thread::spawn(move || shared.serve(port, &listener));
        }
        Ok(switch)
    }

    /// Where a port's cable goes.
    pub(crate) fn path(&self, port: usize) -> &Path {
        &self.paths[port]
    }

    /// Cuts or mends a port's cable: frames in either direction are lost meanwhile.
    pub(crate) fn set_cut(&self, port: usize, cut: bool) {
        self.shared.ports[port].cut.store(cut, Ordering::Relaxed);
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        for path in &self.paths {
            // Wakes the thread that accepts; it sees that the switch has stopped.
            let _ = UnixStream::connect(path);
        }
    }
}

impl SwitchShared {
    /// Serves one host after the other at a port: a host that is started again plugs in again.
    fn serve(self: Arc<Self>, port: usize, listener: &UnixListener) {
        while let Ok((stream, _)) = listener.accept() {
            if self.stopped.load(Ordering::Relaxed) {
                return;
            }
            let Ok(output) = stream.try_clone() else { continue };
            let (sender, frames) = sync_channel(QUEUE);
            *self.ports[port]
                .queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Some(sender);
            let writer = thread::spawn(move || send(&frames, output));
            let mut input = BufReader::with_capacity(256 << 10, stream);
            while let Ok(frame) = receive(&mut input) {
                self.forward(port, &frame);
            }
            *self.ports[port]
                .queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = None;
            let _ = writer.join();
        }
    }

    fn forward(&self, from: usize, frame: &Arc<[u8]>) {
        let (Some(to), Some(by)) = (mac(frame, 0), mac(frame, 6)) else {
            return;
        };
        if self.ports[from].cut.load(Ordering::Relaxed) {
            return;
        }
        let known = {
            let mut learnt = self.learnt.lock().unwrap_or_else(PoisonError::into_inner);
            if !is_group(by) && (learnt.len() < 4096 || learnt.contains_key(&by)) {
                learnt.insert(by, from);
            }
            if is_group(to) {
                None
            } else {
                learnt.get(&to).copied()
            }
        };
        for (port, other) in self.ports.iter().enumerate() {
            let wanted = known.is_none_or(|known| known == port);
            if port != from && wanted && !other.cut.load(Ordering::Relaxed) {
                let queue = other.queue.lock().unwrap_or_else(PoisonError::into_inner);
                // A full queue or an empty port loses the frame.
                let _ = queue.as_ref().map(|queue| queue.try_send(frame.clone()));
            }
        }
    }
}

fn mac(frame: &[u8], at: usize) -> Option<Mac> {
    frame.get(at..).and_then(|rest| rest.first_chunk()).copied()
}

/// Multicast and broadcast addresses.
fn is_group(mac: Mac) -> bool {
    mac[0] & 1 == 1
}

fn receive(from: &mut impl Read) -> io::Result<Arc<[u8]>> {
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    let len = u32::from_be_bytes(len) as usize;
    if len > LONGEST {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {len} bytes"),
        ));
    }
    let mut frame = vec![0; len];
    from.read_exact(&mut frame)?;
    Ok(frame.into())
}

fn send(frames: &Receiver<Arc<[u8]>>, mut to: UnixStream) {
    let mut bytes = Vec::new();
    while let Ok(frame) = frames.recv() {
        bytes.clear();
        bytes.extend_from_slice(&(frame.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&frame);
        if to.write_all(&bytes).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    struct Station {
        stream: UnixStream,
        mac: Mac,
    }

    impl Station {
        fn plug(switch: &Switch, port: usize) -> Self {
            let stream = UnixStream::connect(switch.path(port)).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            while switch.shared.ports[port].queue.lock().unwrap().is_none() {
                thread::yield_now();
            }
            Self {
                stream,
                mac: [2, 0, 0, 0, 0, port as u8],
            }
        }

        fn send_text(&mut self, to: Mac, text: &[u8]) {
            let frame = [&to[..], &self.mac, text].concat();
            let bytes = [&(frame.len() as u32).to_be_bytes()[..], &frame].concat();
            self.stream.write_all(&bytes).unwrap();
        }

        fn receive_text(&mut self) -> Vec<u8> {
            receive(&mut self.stream).unwrap()[12..].to_vec()
        }
    }

    const ALL: Mac = [0xff; 6];

    #[test]
    fn it_floods_then_learns() {
        let folder = tempfile::tempdir().unwrap();
        let switch = Switch::start(folder.path(), 3).unwrap();
        let mut stations: Vec<_> = (0..3).map(|port| Station::plug(&switch, port)).collect();
        let second = stations[1].mac;
        stations[0].send_text(ALL, b"who?");
        assert_eq!(
            (stations[1].receive_text(), stations[2].receive_text()),
            (b"who?".to_vec(), b"who?".to_vec())
        );
        stations[1].send_text(ALL, b"me");
        assert_eq!(
            (stations[0].receive_text(), stations[2].receive_text()),
            (b"me".to_vec(), b"me".to_vec())
        );
        stations[0].send_text(second, b"for you alone");
        assert_eq!(stations[1].receive_text(), b"for you alone");
        // The third receives the next broadcast, and nothing before it.
        stations[0].send_text(ALL, b"bye");
        assert_eq!(stations[2].receive_text(), b"bye");
    }

    #[test]
    fn a_cut_cable_loses_frames_and_a_mended_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let switch = Switch::start(folder.path(), 2).unwrap();
        let (mut a, mut b) = (Station::plug(&switch, 0), Station::plug(&switch, 1));
        switch.set_cut(1, true);
        a.send_text(ALL, b"lost");
        // Frames of one station stay in order: when the mark is learnt, the lost one has been forwarded.
        a.mac = [2, 0, 0, 0, 0, 9];
        a.send_text(ALL, b"mark");
        while !switch.shared.learnt.lock().unwrap().contains_key(&a.mac) {
            thread::yield_now();
        }
        switch.set_cut(1, false);
        a.send_text(ALL, b"received");
        let mut received = b.receive_text();
        if received == b"mark" {
            received = b.receive_text();
        }
        assert_eq!(received, b"received");
    }

    #[test]
    fn a_station_may_leave_and_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let switch = Switch::start(folder.path(), 2).unwrap();
        let mut a = Station::plug(&switch, 0);
        let b = Station::plug(&switch, 1);
        drop(b);
        while switch.shared.ports[1].queue.lock().unwrap().is_some() {
            thread::yield_now();
        }
        a.send_text(ALL, b"while b is away");
        let mut b = Station::plug(&switch, 1);
        a.send_text(ALL, b"b is back");
        let mut received = b.receive_text();
        if received == b"while b is away" {
            received = b.receive_text();
        }
        assert_eq!(received, b"b is back");
    }
}
