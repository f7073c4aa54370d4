//! The destination's side of a migration.

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
    /// Whether the source knows that the guest runs here. If not, it will ask: keep the receiver.
    pub confirmed: bool,
}

/// Listens for a machine, and answers a source that is in doubt about one, for as long as it lives: also between
/// two calls of [`Receiver::receive`], and after the one that received a machine.
#[derive(Debug)]
pub struct Receiver {
    _acceptor: Acceptor,
    rendezvous: Arc<Rendezvous>,
    endpoint: Endpoint,
    options: ReceiveOptions,
}

impl Receiver {
    /// Listens. A socket file that a dead process left behind is taken over.
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

    /// Where it listens, with the port that the system chose if it was to choose one.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Waits for a source and receives its machine.
    ///
    /// Blocks until that has ended; `control` cancels it from another thread, up to "ready": from then on only
    /// the source decides, or an operator through [`Control::decide`]. After an error before the commit the
    /// machine was discarded and `destination` is ready for another attempt; after one with
    /// [`ReceiveError::is_committed`] the machine is kept, paused, and is the only copy that may ever run. Once
    /// a machine has arrived the receiver takes no other.
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

/// Lets the next source in when the job ends, also by a panic.
struct ReleaseOnDrop<'a>(&'a Rendezvous);

impl Drop for ReleaseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// Gives the machine up, tells the source, and throws away what was built.
fn conclude(job: &mut DestinationJob<'_>, link: &mut Link<'_>, error: &ReceiveError) {
    // First of all, so that no "go" counts any more, and the answer to a question is the right one.
    job.discard_claim();
    match error {
        // The source knows, and waits to see that its word was heard: not for as long as it takes to throw a
        // machine away.
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
