use std::time::{Duration, Instant};

use migration_io::digest;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::memory::Incoming;
use super::{ReceiveError, Received};
use crate::control::{Control, Phase};
use crate::link::{KeepAlive, Link, LinkError};
use crate::page_set::PageSet;
use crate::ports::{Destination, MachineDescription, MachineError};
use crate::protocol::{Frame, Hello, Message};
use crate::report::ms;
use crate::text::clean;

/// One migration under way.
pub(super) struct Job<'a> {
    destination: &'a mut dyn Destination,
    control: &'a Control,
    built: bool,
    /// When the machine was accepted; the guest was not paused before that.
    accepted_at: Instant,
    /// "go" came: the machine is ours.
    committed: bool,
}

impl<'a> Job<'a> {
    pub(super) fn new(destination: &'a mut dyn Destination, control: &'a Control) -> Self {
        Self {
            destination,
            control,
            built: false,
            accepted_at: Instant::now(),
            committed: false,
        }
    }

    /// The migration as it goes when nothing goes wrong.
    pub(super) fn run(&mut self, link: &mut Link<'_>, alive: &KeepAlive) -> Result<Received, ReceiveError> {
        hello(link)?;
        let description = described(link)?;
        let mut incoming = self.build(link, alive, &description)?;
        let state = self.fill(link, alive, &mut incoming)?;
        self.restore(link, alive, &state)?;
        drop(state);
        let resume_ms = self.await_go(link, alive)?;
        Ok(Received {
            description,
            resume_ms,
            bytes_received: link.bytes_received(),
            confirmed: true,
        })
    }

    /// Throws away what was built, if anything was.
    pub(super) fn discard(&mut self) {
        if std::mem::take(&mut self.built) {
            self.destination.discard();
        }
    }

    /// The error for a panic, which after "go" is one of the machine's.
    pub(super) fn panicked(&self, message: String) -> ReceiveError {
        if self.committed {
            ReceiveError::NotResumed(format!("panicked: {message}").into())
        } else {
            ReceiveError::Panic(message)
        }
    }

    fn build(
        &mut self,
        link: &mut Link<'_>,
        alive: &KeepAlive,
        description: &MachineDescription,
    ) -> Result<Incoming, ReceiveError> {
        PageSet::check_regions(&description.memory).map_err(ReceiveError::MemoryMap)?;
        let differences = alive.during(|| self.destination.check(description));
        if !differences.is_empty() {
            link.send(&Message::Refuse(differences.clone()))?;
            return Err(ReceiveError::Refused { differences });
        }
        self.built = true;
        let memory = alive.during(|| call("create", self.destination.create(description, None)))?;
        let asked = description.memory.iter().map(|region| (region.gpa, region.len));
        if !memory
            .iter()
            .map(|region| (region.start_addr().0, region.len()))
            .eq(asked)
        {
            return Err(ReceiveError::OtherMemory);
        }
        let incoming = Incoming::new(memory)?;
        self.accepted_at = Instant::now();
        link.send(&Message::Accept)?;
        let total = description.memory.iter().map(|region| region.len).sum();
        self.control.update(|progress| {
            progress.phase = Phase::Precopy;
            progress.total_bytes = total;
        });
        Ok(incoming)
    }

    /// Takes in pages until the state comes.
    fn fill(
        &mut self,
        link: &mut Link<'_>,
        alive: &KeepAlive,
        incoming: &mut Incoming,
    ) -> Result<Vec<u8>, ReceiveError> {
        let what = "pages, round end or the state";
        loop {
            match link.receive(what)? {
                Frame::Pages(table) => incoming.take(link, table)?,
                Frame::Message(Message::RoundEnd(n)) => {
                    self.control.update(|progress| progress.round = n);
                    link.send(&Message::RoundAck(n))?;
                }
                Frame::Message(Message::DigestRequest) => {
                    let digest = alive.during(|| digest(incoming.memory()))?;
                    link.send(&Message::Digest(digest))?;
                }
                Frame::State(state) => return Ok(state),
                frame => {
                    return Err(LinkError::Unexpected {
                        expected: what,
                        got: frame.name(),
                    }
                    .into());
                }
            }
        }
    }

    fn restore(&mut self, link: &mut Link<'_>, alive: &KeepAlive, state: &[u8]) -> Result<(), ReceiveError> {
        self.control
            .update(|progress| progress.phase = Phase::StopAndCopy);
        let began = Instant::now();
        alive.during(|| call("restore", self.destination.restore(state)))?;
        let restore_ns = nanoseconds(began.elapsed());
        link.send(&Message::Ready { restore_ns })?;
        // From here on "go" may be under way: only the source, or its silence, may end it.
        link.ignore_cancel();
        Ok(())
    }

    /// Waits for "go" and lets the guest run. Returns how long that took, in milliseconds.
    fn await_go(&mut self, link: &mut Link<'_>, alive: &KeepAlive) -> Result<f64, ReceiveError> {
        let (stopped_for_ns, round_trip_ns) = match link.receive_message("go")? {
            Message::Go {
                stopped_for_ns,
                round_trip_ns,
            } => (stopped_for_ns, round_trip_ns),
            other => {
                return Err(LinkError::Unexpected {
                    expected: "go",
                    got: other.name(),
                }
                .into());
            }
        };
        let arrived_at = Instant::now();
        self.committed = true;
        self.control.update(|progress| progress.phase = Phase::Commit);
        // Half a round trip ago "go" was sent, and the guest had been paused for that long.
        let ago =
            Duration::from_nanos(stopped_for_ns).saturating_add(Duration::from_nanos(round_trip_ns / 2));
        let stopped_at = arrived_at
            .checked_sub(ago)
            .unwrap_or(self.accepted_at)
            .max(self.accepted_at);
        alive
            .during(|| self.destination.resume(stopped_at))
            .map_err(ReceiveError::NotResumed)?;
        let took = arrived_at.elapsed();
        if let Err(error) = link.send(&Message::Resumed {
            resume_ns: nanoseconds(took),
        }) {
            // The guest runs, and stays: it is the source that is in doubt now.
            tracing::warn!(%error, "the source could not be told that the guest runs here");
        }
        Ok(ms(took))
    }
}

/// Agrees on a version.
fn hello(link: &mut Link<'_>) -> Result<(), ReceiveError> {
    let theirs = match link.receive_message("hello")? {
        Message::Hello(hello) => hello,
        other => {
            return Err(LinkError::Unexpected {
                expected: "hello",
                got: other.name(),
            }
            .into());
        }
    };
    // Before any judgement, so that the source can name both sides' versions as well.
    link.send(&Message::Hello(Hello::ours()))?;
    match theirs.common_version() {
        Some(_) => Ok(()),
        None => Err(ReceiveError::Version {
            ours: Hello::ours().versions(),
            theirs: theirs.versions(),
            release: clean(&theirs.release),
        }),
    }
}

/// Answers pings until the description comes.
fn described(link: &mut Link<'_>) -> Result<MachineDescription, ReceiveError> {
    let what = "ping or describe";
    for _ in 0..MAX_PINGS {
        match link.receive_message(what)? {
            Message::Ping => link.send(&Message::Pong)?,
            Message::Describe(description) => return Ok(description),
            other => {
                return Err(LinkError::Unexpected {
                    expected: what,
                    got: other.name(),
                }
                .into());
            }
        }
    }
    Err(LinkError::Unexpected {
        expected: "describe",
        got: "ping after ping",
    }
    .into())
}

/// More pings are no measurement.
const MAX_PINGS: usize = 64;

fn call<T>(call: &'static str, result: Result<T, MachineError>) -> Result<T, ReceiveError> {
    result.map_err(|source| ReceiveError::Machine { call, source })
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
