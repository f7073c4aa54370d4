//! The destination's side of a migration: listens, receives a machine, attempt after attempt until one succeeds,
//! and answers questions about it.
//!
//! After "ready" nothing here discards the machine by itself; after "go" nothing does at all. A failed attempt leaves
//! neither memory nor disks behind.

mod acceptor;
mod decide;
mod disks;
mod error;
mod fill;
mod job;
mod local;
mod memory;
mod populate;
mod rendezvous;
mod streams;

pub use error::ReceiveError;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use crate::control::Control;
use crate::link::{KeepAlive, Link, LinkError};
use crate::options::ReceiveOptions;
use crate::ports::{Destination, MachineDescription};
use crate::text::{chain, panic_message};
use crate::transport::{Endpoint, Listener, TransportError};
use acceptor::Acceptor;
use job::DestinationJob;
use local::LocalSide;
use rendezvous::{Caller, Rendezvous};

/// What was received: the guest runs here.
#[derive(Clone, Debug, PartialEq)]
pub struct Received {
    /// The machine, as the source described it.
    pub description: MachineDescription,
    /// How long it took after "go" until the last vCPU was let in, in milliseconds.
    pub resume_ms: f64,
    /// Bytes that came over the connections.
    pub bytes_received: u64,
    /// Whether the source knows that the guest runs here. If not, it will ask: the caller must keep the receiver.
    pub confirmed: bool,
}

/// Listens for a machine, and answers a source that is in doubt about one. It does so until it is dropped: also between
/// two calls of [`Receiver::receive`], and after a machine was received.
#[derive(Debug)]
pub struct Receiver {
    _acceptor: Acceptor,
    rendezvous: Arc<Rendezvous>,
    endpoint: Endpoint,
    options: ReceiveOptions,
}

impl Receiver {
    /// Starts to listen. A socket file that a dead process left behind is replaced.
    pub fn listen(endpoint: &Endpoint, options: ReceiveOptions) -> Result<Self, TransportError> {
        let listener = Listener::bind(endpoint)?;
        let endpoint = listener.endpoint().clone();
        let failed = |source| TransportError::Listen {
            endpoint: endpoint.clone(),
            source,
        };
        let rendezvous = Arc::new(Rendezvous::new().map_err(failed)?);
        let acceptor = Acceptor::open(listener, rendezvous.clone(), options.clone()).map_err(failed)?;
        Ok(Self {
            _acceptor: acceptor,
            rendezvous,
            endpoint,
            options,
        })
    }

    /// Where it listens; for port 0 with the port that the kernel chose.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Waits for a source and receives its machine.
    ///
    /// Blocks until that has ended; `control` cancels it from another thread, up to "ready": from then on only
    /// the source decides, or an operator through [`Control::decide`]. After an error before the commit the
    /// machine was discarded and `destination` is ready for another attempt; after one with
    /// [`ReceiveError::is_committed`] the machine is kept, paused, and is the only copy that may ever run. Once
    /// a machine has arrived the receiver accepts no other.
    pub fn receive(
        &mut self,
        destination: &mut dyn Destination,
        control: &Control,
    ) -> Result<Received, ReceiveError> {
        let caller = self.rendezvous.wait_for_source(control)?;
        let _release = ReleaseOnDrop(&self.rendezvous);
        control.begin();
        let result = self.run_attempt(destination, control, &caller);
        control.end();
        match (result, self.rendezvous.abandoned()) {
            (Err(error), streams @ 1..) if !error.is_committed() => {
                tracing::error!(
                    error = chain(&error),
                    "an attempt failed, and left threads behind"
                );
                Err(ReceiveError::Hang { streams })
            }
            (result, _) => result,
        }
    }

    /// Receives the machine of one source; after a failure before the commit nothing of the attempt is left.
    fn run_attempt(
        &self,
        destination: &mut dyn Destination,
        control: &Control,
        caller: &Caller,
    ) -> Result<Received, ReceiveError> {
        let options = &self.options;
        let alive = KeepAlive::new(options.io_timeout);
        let mut link = Link::new(
            &caller.connection,
            control,
            options.io_timeout,
            options.step_timeout,
        );
        let mut job = DestinationJob::new(LocalSide {
            destination,
            rendezvous: &self.rendezvous,
            control,
            options,
        });
        thread::scope(|scope| {
            let run = AssertUnwindSafe(|| {
                alive.start(scope, link.pulse()).map_err(ReceiveError::Thread)?;
                job.run(&mut link, caller)
            });
            let result =
                catch_unwind(run).unwrap_or_else(|panic| Err(job.panic_error(panic_message(&*panic))));
            alive.stop();
            if let Err(error) = &result
                && !error.is_committed()
            {
                conclude(&mut job, &mut link, error);
            }
            result
        })
    }
}

/// Admits the next source when the job ends, also by a panic.
struct ReleaseOnDrop<'a>(&'a Rendezvous);

impl Drop for ReleaseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// After a failed attempt gives the machine up, sends the source an abort, and discards the machine.
fn conclude(job: &mut DestinationJob<'_>, link: &mut Link<'_>, error: &ReceiveError) {
    // This comes first: from here on no "go" counts, and a question is answered with "given up".
    job.discard_claim();
    match error {
        // The source sent the abort and waits until this side closes the connection, which must not take as long as
        // discarding a machine does.
        ReceiveError::Link(LinkError::Aborted { .. } | LinkError::Closed { .. }) => link.close(),
        ReceiveError::Refused { .. } => {
            link.hang_up();
        }
        _ => {
            link.abort(
                matches!(error, ReceiveError::Link(LinkError::Cancelled)),
                &chain(error),
            );
        }
    }
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job.discard())) {
        tracing::error!(
            message = panic_message(&*panic),
            "discarding the machine panicked"
        );
    }
}
