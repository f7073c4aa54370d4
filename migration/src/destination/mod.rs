//! The destination's side of a migration.

mod error;
mod job;
mod memory;

pub use error::ReceiveError;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use crate::control::Control;
use crate::link::{KeepAlive, Link, LinkError};
use crate::options::ReceiveOptions;
use crate::ports::{Destination, MachineDescription};
use crate::protocol::Message;
use crate::text::{chain, panic_message};
use crate::transport::{Connection, Endpoint, Listener, TransportError};
use job::Job;

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

/// Listens for a machine, and afterwards answers a source that is in doubt about it.
#[derive(Debug)]
pub struct Receiver {
    listener: Listener,
    options: ReceiveOptions,
}

impl Receiver {
    /// Listens. A socket file that a dead process left behind is taken over.
    pub fn listen(endpoint: &Endpoint, options: ReceiveOptions) -> Result<Self, TransportError> {
        let listener = Listener::bind(endpoint)?;
        Ok(Self { listener, options })
    }

    /// Where it listens, with the port that the system chose if it was to choose one.
    pub fn endpoint(&self) -> &Endpoint {
        self.listener.endpoint()
    }

    /// Waits for a source and receives its machine.
    ///
    /// Blocks until that has ended; `control` cancels it from another thread, up to "ready": from then on only
    /// the source decides, or an operator through [`Control::decide`]. After an error before "go" the machine
    /// was discarded and `destination` is ready for another attempt; after one with
    /// [`ReceiveError::is_committed`] the machine is kept, paused, and is the only copy that may ever run.
    pub fn receive(
        &mut self,
        destination: &mut dyn Destination,
        control: &Control,
    ) -> Result<Received, ReceiveError> {
        let connection = self.listener.accept(control)?;
        receive(destination, &connection, &self.options, control)
    }
}

fn receive(
    destination: &mut dyn Destination,
    connection: &Connection,
    options: &ReceiveOptions,
    control: &Control,
) -> Result<Received, ReceiveError> {
    let new_link = || Link::new(connection, control, options.io_timeout, options.step_timeout);
    let alive = KeepAlive::new(options.io_timeout);
    let mut link = new_link();
    control.begin();
    let mut job = Job::new(destination, control);
    thread::scope(|scope| {
        alive.start(scope, new_link()).map_err(ReceiveError::Thread)?;
        let result = catch_unwind(AssertUnwindSafe(|| job.run(&mut link, &alive)));
        alive.stop();
        let result = result.unwrap_or_else(|panic| Err(job.panicked(panic_message(&*panic))));
        if let Err(error) = &result {
            conclude(&mut job, &mut link, error);
        }
        control.end();
        result
    })
}

/// Tells the source, and throws away what was built unless it is the only copy.
fn conclude(job: &mut Job<'_>, link: &mut Link<'_>, error: &ReceiveError) {
    let reason = chain(error);
    match error {
        _ if error.is_committed() => {
            // If this does not arrive, the source is in doubt, which is just as well.
            let _ = link.send(&Message::ResumeFailed { reason });
            return;
        }
        // The source knows, or cannot be told.
        ReceiveError::Link(LinkError::Aborted { .. } | LinkError::Closed { .. }) => {}
        ReceiveError::Refused { .. } => link.hang_up(),
        _ => link.abort(matches!(error, ReceiveError::Link(LinkError::Cancelled)), &reason),
    }
    let discarded = catch_unwind(AssertUnwindSafe(|| job.discard()));
    if let Err(panic) = discarded {
        tracing::error!(
            message = panic_message(&*panic),
            "discarding the machine panicked"
        );
    }
}
