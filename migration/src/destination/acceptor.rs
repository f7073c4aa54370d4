//! Accepts connections for as long as there is a receiver, and reads from each its greeting: the beginning of a
//! migration, one of its streams, or a question.
//!
//! Any process that can reach the socket may connect. The number of connections, their threads and the time for a
//! greeting are bounded, and one that does not belong to the migration under way must not disturb it.

use std::net::Shutdown;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use threads::{Role, Thread};

use super::rendezvous::{Caller, ConnectionRefusal, Rendezvous};
use crate::control::Control;
use crate::link::{Link, LinkError};
use crate::options::ReceiveOptions;
use crate::protocol::{Hello, Message, Token};
use crate::text::{chain, clean};
use crate::transport::{Connection, Listener, TransportError};

/// How long a peer may take for its greeting.
const GREETING_TIMEOUT: Duration = Duration::from_secs(3);

/// The most connections whose greeting has not come yet. One more closes the oldest of them.
const MAX_PENDING: usize = 64;

/// The most threads that read greetings or are about to end, even if a peer connects a thousand times a second.
const MAX_THREADS: usize = 2 * MAX_PENDING;

/// The pause after an accept that failed, e.g. for want of file descriptors: the kernel does not report when there are
/// some again.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The thread that accepts connections, until this is dropped; then the listener, and a Unix socket's file, are gone.
#[derive(Debug)]
pub(super) struct Acceptor {
    shared: Arc<AcceptorShared>,
    thread: Option<Thread>,
}

/// What the acceptor's threads share.
#[derive(Debug)]
struct AcceptorShared {
    rendezvous: Arc<Rendezvous>,
    options: ReceiveOptions,
    /// Cancelled when the acceptor is dropped.
    closing: Control,
}

/// Why a connection is refused.
#[derive(Debug, thiserror::Error)]
enum GreetingError {
    #[error("it speaks protocol versions {theirs} (godwit {release}), expected one of {ours}")]
    Version {
        ours: String,
        theirs: String,
        release: String,
    },
    #[error(transparent)]
    Refused(#[from] ConnectionRefusal),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("no random numbers for a token")]
    Random(#[source] std::io::Error),
    #[error("no answer yet: the guest is about to run")]
    Undecided,
}

/// A connection, and the thread that reads its greeting.
struct PendingGreeting {
    /// Empty once the peer's greeting has come, or its time is over. Shared with the thread.
    connection: Arc<Mutex<Option<Arc<Connection>>>>,
    deadline: Instant,
    thread: Thread,
}

impl Acceptor {
    /// Starts to accept connections.
    pub(super) fn open(
        listener: Listener,
        rendezvous: Arc<Rendezvous>,
        options: ReceiveOptions,
    ) -> std::io::Result<Self> {
        let closing = Control::new()?;
        let shared = Arc::new(AcceptorShared {
            rendezvous,
            options,
            closing,
        });
        let accepting = shared.clone();
        let thread = threads::spawn(Role::Acceptor, "acceptor", move || accepting.accept(&listener))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.shared.closing.cancel();
        self.shared.rendezvous.close();
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has been printed.
            let _ = thread.join();
        }
    }
}

impl AcceptorShared {
    /// Accepts connections until the acceptor is dropped, and closes those whose greeting does not come in time.
    fn accept(self: &Arc<Self>, listener: &Listener) {
        let mut greetings: Vec<PendingGreeting> = Vec::new();
        loop {
            greetings.retain(|greeting| !greeting.thread.is_finished());
            let now = Instant::now();
            greetings
                .iter()
                .filter(|greeting| greeting.deadline <= now)
                .for_each(PendingGreeting::close_if_pending);
            let next = greetings
                .iter()
                .filter(|greeting| greeting.is_pending())
                .map(|greeting| greeting.deadline)
                .min();
            match listener.accept(&self.closing, next) {
                Ok(Some(connection)) => self.start_greeting(connection, &mut greetings),
                Ok(None) => {}
                Err(TransportError::Cancelled) => break,
                Err(error) => {
                    tracing::warn!(error = chain(&error), "no connection accepted");
                    self.closing.wait_for_cancel(ACCEPT_RETRY);
                }
            }
        }
        for greeting in greetings {
            greeting.close_if_pending();
            let _ = greeting.thread.join();
        }
    }

    /// Starts a thread that reads the greeting. If too many are pending, closes the oldest of them first, or refuses the
    /// new connection.
    fn start_greeting(self: &Arc<Self>, connection: Connection, greetings: &mut Vec<PendingGreeting>) {
        // A thread whose greeting has come, or whose connection was closed, still counts until it gets to run, and ends.
        if greetings.len() >= MAX_THREADS {
            tracing::warn!(
                from = %connection.peer(),
                "too many connections at a time; one is refused"
            );
            return;
        }
        let mut pending = greetings.iter().filter(|greeting| greeting.is_pending());
        let oldest = pending.next();
        if pending.count() + 1 >= MAX_PENDING
            && let Some(oldest) = oldest
        {
            oldest.close_if_pending();
        }
        let connection = Arc::new(Mutex::new(Some(Arc::new(connection))));
        let (shared, pending) = (self.clone(), connection.clone());
        let spawned = threads::spawn(Role::Greeting, "greeting", move || shared.serve(&pending));
        match spawned {
            Ok(thread) => greetings.push(PendingGreeting {
                connection,
                deadline: Instant::now() + GREETING_TIMEOUT,
                thread,
            }),
            Err(error) => tracing::warn!(%error, "no thread to read a greeting"),
        }
    }

    /// Reads one greeting and acts on it; if that fails, sends the peer an abort with the reason.
    fn serve(&self, pending: &Mutex<Option<Arc<Connection>>>) {
        let Some(connection) = lock(pending).clone() else {
            return;
        };
        let mut link = Link::new(&connection, &self.closing, GREETING_TIMEOUT, GREETING_TIMEOUT);
        if let Err(error) = self.process_greeting(&mut link, pending, &connection) {
            let reason = chain(&error);
            tracing::info!(from = %connection.peer(), "connection refused: {reason}");
            link.abort(false, &reason);
        }
    }

    /// Compares versions, reads the greeting, and brings the connection to the job or answers the question.
    fn process_greeting(
        &self,
        link: &mut Link<'_>,
        pending: &Mutex<Option<Arc<Connection>>>,
        connection: &Arc<Connection>,
    ) -> Result<(), GreetingError> {
        exchange_hello(link)?;
        let what = "begin, join or ask";
        let greeting = link.receive_message(what)?;
        // The greeting has come: from here on the acceptor does not close the connection any more.
        if lock(pending).take().is_none() {
            return Ok(());
        }
        match greeting {
            Message::Begin(features) => {
                let caller = Caller {
                    connection: connection.clone(),
                    token: new_token()?,
                    features,
                };
                Ok(self.rendezvous.begin(caller, Instant::now() + GREETING_TIMEOUT)?)
            }
            Message::Join { token, index } => Ok(self.rendezvous.join(token, index, connection.clone())?),
            Message::Ask(token) => {
                let until = Instant::now() + self.options.io_timeout;
                let outcome = self
                    .rendezvous
                    .attempt_outcome(token, until)
                    .ok_or(GreetingError::Undecided)?;
                tracing::info!(
                    from = %connection.peer(),
                    ?outcome,
                    "a source asked for its machine"
                );
                link.send(&Message::AttemptOutcome(outcome))?;
                link.hang_up();
                Ok(())
            }
            other => Err(LinkError::Unexpected {
                expected: what,
                got: other.name(),
            }
            .into()),
        }
    }
}

impl PendingGreeting {
    /// Whether the peer's greeting has not come yet.
    fn is_pending(&self) -> bool {
        lock(&self.connection).is_some()
    }

    /// Closes the connection, unless the peer's greeting has come.
    fn close_if_pending(&self) {
        if let Some(connection) = lock(&self.connection).take() {
            tracing::info!(from = %connection.peer(), "a connection sent no greeting in time");
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that holds it panics.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn exchange_hello(link: &mut Link<'_>) -> Result<(), GreetingError> {
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
    // Before the versions are compared, so that the source can name those of both sides in its error.
    link.send(&Message::Hello(Hello::ours()))?;
    match theirs.common_version() {
        Some(_) => Ok(()),
        None => Err(GreetingError::Version {
            ours: Hello::ours().versions(),
            theirs: theirs.versions(),
            release: clean(&theirs.release),
        }),
    }
}

fn new_token() -> Result<Token, GreetingError> {
    use rustix::rand::{GetRandomFlags, getrandom};
    let mut token = Token::default();
    // Up to 256 bytes come whole, once the system has any (getrandom(2)).
    match getrandom(&mut token[..], GetRandomFlags::empty()) {
        Ok(got) if got == token.len() => Ok(token),
        Ok(_) => Err(GreetingError::Random(std::io::ErrorKind::UnexpectedEof.into())),
        Err(error) => Err(GreetingError::Random(error.into())),
    }
}
