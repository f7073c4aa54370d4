//! One migration that arrives, from the source's announcement to the resume: checks and builds the machine, fills it,
//! restores it, sends "ready", waits for the decision and lets the guest run.
//!
//! Must not let the guest run before the ledger records "go" or an operator's "run". What the source announces is
//! checked before anything is built from it.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use threads::Role;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::decide::{MayRun, Waiting};
use super::disks::Disks;
use super::error::call;
use super::fill::Filling;
use super::local::LocalSide;
use super::memory::Incoming;
use super::populate::Populate;
use super::rendezvous::Caller;
use super::streams::Streams;
use super::{ReceiveError, Received};
use crate::commit::Stage;
use crate::control::Phase;
use crate::link::{Admitted, Link, LinkError, Sorted};
use crate::options::MAX_STREAMS;
use crate::page_set::PageSet;
use crate::ports::{MachineDescription, OfferedDisks};
use crate::protocol::{Features, MemoryTransfer, Message, nanoseconds};
use crate::report::ms;
use crate::text::panic_message;

/// One migration under way.
pub(super) struct DestinationJob<'a> {
    local: LocalSide<'a>,
    /// Whether there may be a machine to be discarded.
    built: bool,
}

/// What the source has announced.
struct Announced {
    description: MachineDescription,
    transfer: MemoryTransfer,
    disks: OfferedDisks,
}

/// The most pings in a handshake.
const MAX_PINGS: usize = 64;

/// How long the streams of a failed attempt may take to end, after their connections were closed.
const STREAMS_END_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the source may take to answer "resumed", which it does at once.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

impl<'a> DestinationJob<'a> {
    pub(super) fn new(local: LocalSide<'a>) -> Self {
        Self { local, built: false }
    }

    /// The steps of a migration that succeeds.
    pub(super) fn run(&mut self, link: &mut Link<'_>, caller: &Caller) -> Result<Received, ReceiveError> {
        let features = self.features(caller);
        link.admit(Admitted::Messages);
        link.send(&Message::Session {
            token: caller.token,
            features,
        })?;
        let announced = receive_description(link)?;
        let incoming = Arc::new(self.build(link, &announced, features)?);
        let accepted_at = Instant::now();
        let may_run = self.fill_and_wait(link, &incoming, announced.transfer)?;
        // The guest still ran when "accept" was sent: an earlier time is wrong.
        let stopped_at = may_run.stopped_at.map_or(accepted_at, |at| at.max(accepted_at));
        let resume_ms = self.resume(link, stopped_at)?;
        let confirmed = may_run.connected && await_farewell(link);
        Ok(Received {
            description: announced.description,
            resume_ms,
            bytes_received: link.bytes_received() + incoming.received(),
            confirmed,
        })
    }

    /// The error for a panic. After the commit it says that the machine is kept, because it is the only copy.
    pub(super) fn panic_error(&self, message: String) -> ReceiveError {
        self.local.rendezvous.with_ledger(|ledger| match ledger.stage() {
            Stage::Committing(_) | Stage::Runs(_) | Stage::Kept { .. } => {
                ledger.kept(format!("panicked: {message}"));
                ReceiveError::NotResumed(format!("panicked: {message}").into())
            }
            _ => ReceiveError::Panic(message),
        })
    }

    /// Gives the machine up in the ledger, unless "go" was recorded: from here on it no longer counts.
    pub(super) fn discard_claim(&self) {
        self.local.rendezvous.with_ledger(|ledger| ledger.discard());
    }

    /// Discards the machine, if one was built.
    pub(super) fn discard(&mut self) {
        if std::mem::take(&mut self.built) {
            self.local.destination.discard();
        }
    }

    /// The features that both sides have, on this kind of connection.
    fn features(&self, caller: &Caller) -> Features {
        let ours = if caller.connection.passes_files() {
            Features::OURS
        } else {
            Features(Features::OURS.0 & !Features::HANDOVER.0)
        };
        ours.and(caller.features)
    }

    /// Checks what the source has announced, and builds the machine, without its state.
    fn build(
        &mut self,
        link: &mut Link<'_>,
        announced: &Announced,
        features: Features,
    ) -> Result<Incoming, ReceiveError> {
        let Announced {
            description,
            transfer,
            disks: offered,
        } = announced;
        PageSet::check_regions(&description.memory).map_err(ReceiveError::MemoryMap)?;
        let files = match *transfer {
            MemoryTransfer::Streams(1..=MAX_STREAMS) => None,
            MemoryTransfer::Streams(got) => {
                return Err(ReceiveError::StreamCount {
                    most: MAX_STREAMS,
                    got,
                });
            }
            MemoryTransfer::Handover => Some(receive_memory_files(link, description, features)?),
        };
        let differences = self.local.destination.check(description, offered);
        if !differences.is_empty() {
            link.send(&Message::Refuse(differences.clone()))?;
            return Err(ReceiveError::Refused { differences });
        }
        self.built = true;
        let memory = call(
            "create",
            self.local.destination.create(description, files, offered),
        )?;
        let asked = description.memory.iter().map(|region| (region.gpa, region.len));
        if !memory
            .iter()
            .map(|region| (region.start_addr().0, region.len()))
            .eq(asked)
        {
            return Err(ReceiveError::OtherMemory);
        }
        let disks = Disks::new(self.local.destination.blank_disks(), &description.memory)?;
        let total = description.memory.iter().map(|region| region.len).sum::<u64>() + disks.bytes();
        let incoming = Incoming::new(memory, disks);
        self.local.control.update(|progress| {
            progress.phase = Phase::Precopy;
            progress.total_bytes = total;
        });
        Ok(incoming)
    }

    /// Receives memory and state, restores the machine, sends "ready" and waits for the decision.
    fn fill_and_wait(
        &mut self,
        link: &mut Link<'_>,
        incoming: &Arc<Incoming>,
        transfer: MemoryTransfer,
    ) -> Result<MayRun, ReceiveError> {
        let count = match transfer {
            MemoryTransfer::Streams(count) => count,
            MemoryTransfer::Handover => 0,
        };
        // Before "accept", after which streams may join.
        self.local.rendezvous.expect_streams(count);
        let populate = Arc::new(Populate::new(incoming.clone())?);
        let (rendezvous, options) = (self.local.rendezvous.clone(), self.local.options.clone());
        let streams = Streams::new(incoming.clone(), populate.clone(), rendezvous, options, count)?;
        let ahead = count > 0 && !self.local.destination.is_resident();
        link.admit(Admitted::Machine);
        link.send(&Message::Accept {
            disks: incoming.disks().devices(),
        })?;
        thread::scope(|scope| {
            // Ends the threads on every way out.
            let _end = EndStreams(&streams, &populate);
            if ahead {
                // The thread only saves time: the migration does not depend on it.
                let thread = threads::spawn_scoped(scope, Role::Helper, "populate", || populate.run())
                    .map_err(ReceiveError::Thread)?;
                populate.set_thread(thread.thread().clone());
            }
            let mut filling = Filling::new(&mut self.local, link, incoming, &streams, &populate);
            let state = filling.run()?;
            let arrived_at = Instant::now();
            // Nothing may come after the state: a page would be written into a machine that is complete.
            streams.end();
            streams.join(self.local.options.step_timeout)?;
            self.restore(link, &state)?;
            drop(state);
            Waiting::new(&self.local, link, arrived_at).run()
        })
    }

    /// Restores the machine and sends "ready".
    fn restore(&mut self, link: &mut Link<'_>, state: &[u8]) -> Result<(), ReceiveError> {
        self.local
            .control
            .update(|progress| progress.phase = Phase::StopAndCopy);
        let began = Instant::now();
        call("restore", self.local.destination.restore(state))?;
        let restore_ns = nanoseconds(began.elapsed());
        link.check("nothing before ready")?;
        if !self.local.rendezvous.with_ledger(|ledger| ledger.ready()) {
            return Err(ReceiveError::GivenUp);
        }
        // From here on "go" may be under way: only "go", an abort, a question or the operator may end the wait.
        link.ignore_cancel();
        if let Err(error) = link.send(&Message::Ready { restore_ns }) {
            // The message may have arrived all the same, so the error decides nothing.
            tracing::warn!(%error, "\"ready\" could not be sent to the source");
        }
        Ok(())
    }

    /// Lets the guest run. Returns how long that took, in milliseconds.
    fn resume(&mut self, link: &mut Link<'_>, stopped_at: Instant) -> Result<f64, ReceiveError> {
        let began = Instant::now();
        self.local
            .control
            .update(|progress| progress.phase = Phase::Commit);
        let run = AssertUnwindSafe(|| self.local.destination.resume(stopped_at));
        let resumed = catch_unwind(run)
            .unwrap_or_else(|panic| Err(format!("panicked: {}", panic_message(&*panic)).into()));
        let took = began.elapsed();
        if let Err(error) = resumed {
            let error = ReceiveError::NotResumed(error);
            let reason = crate::text::clean(&crate::text::chain(&error));
            self.local
                .rendezvous
                .with_ledger(|ledger| ledger.kept(reason.clone()));
            // If this does not arrive, the source asks.
            if link.send(&Message::ResumeFailed { reason }).is_ok() {
                link.hang_up();
            }
            return Err(error);
        }
        self.local.rendezvous.with_ledger(|ledger| ledger.resumed());
        if let Err(error) = link.send(&Message::Resumed {
            resume_ns: nanoseconds(took),
        }) {
            // The guest runs on here. The source is in doubt now and will ask.
            tracing::warn!(%error, "\"resumed\" could not be sent to the source");
        }
        Ok(ms(took))
    }
}

/// Ends the streams' threads and the one that populates memory when it is dropped.
struct EndStreams<'a>(&'a Streams, &'a Populate);

impl Drop for EndStreams<'_> {
    fn drop(&mut self) {
        self.0.end();
        self.1.stop();
        // A thread that hangs owns its memory and disks, so it can be left behind: nothing else uses them any more.
        if let Err(error) = self.0.join(STREAMS_END_TIMEOUT) {
            tracing::error!(error = crate::text::chain(&error), "threads are left alone");
        }
    }
}

/// Answers pings until the description comes, and returns it with what the source announces beside it.
fn receive_description(link: &mut Link<'_>) -> Result<Announced, ReceiveError> {
    let what = "ping or describe";
    for _ in 0..MAX_PINGS {
        match link.receive_message(what)? {
            Message::Ping => link.send(&Message::Pong)?,
            Message::Describe {
                machine,
                transfer,
                disks,
            } => {
                return Ok(Announced {
                    description: machine,
                    transfer,
                    disks,
                });
            }
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

/// The files of a handover, one for each region.
fn receive_memory_files(
    link: &mut Link<'_>,
    description: &MachineDescription,
    features: Features,
) -> Result<Vec<OwnedFd>, ReceiveError> {
    if !features.has(Features::HANDOVER) {
        return Err(ReceiveError::Handover {
            expected: "a Unix socket, and a source and a destination that both can".into(),
            got: "a handover all the same".into(),
        });
    }
    let what = "memory files";
    let (message, files) = link.receive_with_files(what)?;
    match message {
        Message::MemoryFiles if files.len() == description.memory.len() => Ok(files),
        Message::MemoryFiles => Err(ReceiveError::Handover {
            expected: format!("{} files", description.memory.len()),
            got: format!("{}", files.len()),
        }),
        other => Err(LinkError::Unexpected {
            expected: what,
            got: other.name(),
        }
        .into()),
    }
}

/// Whether the source answers "resumed" in time.
fn await_farewell(link: &mut Link<'_>) -> bool {
    let until = Instant::now() + FAREWELL_TIMEOUT;
    while Instant::now() < until {
        match link.await_peer(&[], Some(until)) {
            Ok(_) => match link.poll("farewell") {
                Ok(Some(Sorted::Frame(frame))) => return frame.is(&Message::Farewell),
                Ok(_) => {}
                Err(_) => return false,
            },
            Err(_) => return false,
        }
    }
    false
}
