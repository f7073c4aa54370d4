//! The proxy: its listener, its connections, and what their threads share.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};

use crate::fault::{Direction, FaultPlan, FaultPoint, NetworkPace, ProxyConnection, ProxyFault};
use crate::frame::ProxyFrame;
use crate::pump::{Pair, Pump};
use crate::socket::{Address, Bell, ProxyListener, ProxySocket};

/// Passes connections on, records their messages, and injects faults. Everything that it started ends when it
/// is dropped.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<ProxyShared>,
    address: Address,
    accepting: Option<JoinHandle<()>>,
}

/// Why there is no proxy.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// It cannot listen there.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: Address,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The system has no descriptor or no thread left.
    #[error("cannot start")]
    Start(#[source] io::Error),
}

/// What the threads of a proxy share.
#[derive(Debug)]
pub(crate) struct ProxyShared {
    to: Address,
    bell: Bell,
    state: Mutex<ProxyState>,
}

#[derive(Debug, Default)]
struct ProxyState {
    plans: Vec<FaultPlan>,
    seen: Vec<FaultPoint>,
    counts: HashMap<(ProxyConnection, Direction, String), u32>,
    struck: usize,
    /// Whether the network is gone.
    cut: bool,
    /// How fast bytes pass.
    pace: NetworkPace,
    /// Whether the control connection was made.
    begun: bool,
    /// Streams that were announced.
    streams: u32,
    /// Those of them that were made.
    opened: u32,
    pairs: Vec<Weak<Pair>>,
    threads: Vec<JoinHandle<()>>,
}

impl Proxy {
    /// Listens at `address` and passes what comes on to `to`. With port 0 the system chooses one.
    pub fn start(address: &Address, to: &Address, plans: Vec<FaultPlan>) -> Result<Self, ProxyError> {
        let listener = ProxyListener::bind(address).map_err(|source| ProxyError::Listen {
            address: address.clone(),
            source,
        })?;
        let address = listener.address().clone();
        let state = ProxyState {
            plans,
            ..ProxyState::default()
        };
        let shared = Arc::new(ProxyShared {
            to: to.clone(),
            bell: Bell::new().map_err(ProxyError::Start)?,
            state: Mutex::new(state),
        });
        let all = shared.clone();
        let accepting = thread::Builder::new()
            .name("proxy".into())
            .spawn(move || all.accept_all(&listener))
            .map_err(ProxyError::Start)?;
        Ok(Self {
            shared,
            address,
            accepting: Some(accepting),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Every message that came, in the order in which they came, those that did not pass included.
    pub fn seen(&self) -> Vec<FaultPoint> {
        self.shared.lock().seen.clone()
    }

    /// How many of the plans have struck.
    pub fn struck(&self) -> usize {
        self.shared.lock().struck
    }

    /// The network goes: see [`ProxyFault::CutAll`].
    pub fn cut_all(&self) {
        self.shared.cut_all();
    }

    /// From now on bytes pass at this pace, both ways on every connection; those of a frame that is under way too.
    pub fn pace(&self, pace: NetworkPace) {
        self.shared.lock().pace = pace;
    }

    /// The network is there again: new connections pass.
    pub fn heal(&self) {
        self.shared.lock().cut = false;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.bell.ring();
        if let Some(thread) = self.accepting.take() {
            // A thread that panicked has printed its message already.
            let _ = thread.join();
        }
        self.shared.cut_all();
        let threads = std::mem::take(&mut self.shared.lock().threads);
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl ProxyShared {
    fn accept_all(self: Arc<Self>, listener: &ProxyListener) {
        while let Some(front) = listener.accept(&self.bell) {
            let passed = if self.lock().cut {
                Err(front)
            } else {
                match ProxySocket::connect(&self.to) {
                    Ok(back) => self.open(front, back),
                    Err(_) => Err(front),
                }
            };
            if let Err(refused) = passed {
                refused.reset_on_close();
            }
        }
    }

    /// Starts to pass a connection on; gives it back if it cannot. The other side is then reset as well: it may have
    /// seen the connection before the network went.
    fn open(self: &Arc<Self>, front: ProxySocket, back: ProxySocket) -> Result<(), ProxySocket> {
        let Ok(bell) = Bell::new() else {
            back.reset_on_close();
            return Err(front);
        };
        let mut state = self.lock();
        if state.cut {
            back.reset_on_close();
            return Err(front);
        }
        let connection = state.next_connection();
        let pair = Arc::new(Pair::new(front, back, bell, connection));
        state.pairs.retain(|pair| pair.strong_count() > 0);
        state.pairs.push(Arc::downgrade(&pair));
        for direction in [Direction::ToDestination, Direction::ToSource] {
            let pump = Pump::new(self.clone(), pair.clone(), direction);
            let spawned = thread::Builder::new()
                .name(format!("proxy {connection:?} {direction:?}"))
                .spawn(move || pump.run());
            match spawned {
                Ok(thread) => state.threads.push(thread),
                Err(_) => pair.reset(),
            }
        }
        Ok(())
    }

    /// Records a message; returns the fault that strikes it.
    pub(crate) fn note(
        &self,
        connection: ProxyConnection,
        direction: Direction,
        message: String,
    ) -> Option<ProxyFault> {
        let mut state = self.lock();
        let count = state
            .counts
            .entry((connection, direction, message.clone()))
            .or_default();
        let point = FaultPoint {
            connection,
            direction,
            message,
            occurrence: *count,
        };
        *count += 1;
        let at = state.plans.iter().position(|plan| plan.point == point);
        state.seen.push(point);
        let plan = state.plans.swap_remove(at?);
        state.struck += 1;
        Some(plan.fault)
    }

    /// How fast bytes pass now.
    pub(crate) fn pace(&self) -> NetworkPace {
        self.lock().pace
    }

    /// Expects the streams that a message announces.
    pub(crate) fn expect_streams(&self, frame: &ProxyFrame) {
        if let Some(streams) = frame.streams() {
            let mut state = self.lock();
            (state.streams, state.opened) = (streams, 0);
        }
    }

    pub(crate) fn set_pace(&self, pace: NetworkPace) {
        self.lock().pace = pace;
    }

    pub(crate) fn cut_all(&self) {
        let mut state = self.lock();
        state.cut = true;
        for pair in state.pairs.drain(..).filter_map(|pair| pair.upgrade()) {
            pair.reset();
        }
    }

    fn lock(&self) -> MutexGuard<'_, ProxyState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ProxyState {
    /// What the next connection will be for by the order of connections; its first message decides later.
    fn next_connection(&mut self) -> ProxyConnection {
        if !self.begun {
            self.begun = true;
            return ProxyConnection::Control;
        }
        if self.opened == self.streams {
            return ProxyConnection::Ask;
        }
        self.opened += 1;
        ProxyConnection::Stream(self.opened - 1)
    }
}
