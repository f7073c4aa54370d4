//! Hears what each connection wants, for as long as there is a receiver.

use std::net::Shutdown;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use threads::{Role, Thread};

use super::desk::{Arrival, Desk, Refusal};
use crate::control::Control;
use crate::link::{Link, LinkError};
use crate::options::ReceiveOptions;
use crate::protocol::{Hello, Message, Token};
use crate::text::{chain, clean};
use crate::transport::{Connection, Listener, TransportError};

/// How long a connection has to say what it wants.
const GREETING: Duration = Duration::from_secs(3);

/// Connections that are heard at a time; one more, and the one that has been silent for longest goes.
const MOST_GUESTS: usize = 64;

/// Threads that hear connections or have done so, at a time: whoever connects a thousand times a second gets no more.
const MOST_THREADS: usize = 2 * MOST_GUESTS;

/// After an accept that failed, e.g. for want of file descriptors: nothing tells when there are some again.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Accepts connections until it is dropped; then the listener, and a Unix socket's file, are gone.
#[derive(Debug)]
pub(super) struct Door {
    hall: Arc<Hall>,
    thread: Option<Thread>,
}

/// What the door's threads share.
#[derive(Debug)]
struct Hall {
    desk: Arc<Desk>,
    options: ReceiveOptions,
    /// Cancelled when the door closes.
    closing: Control,
}

/// Why a connection is refused.
#[derive(Debug, thiserror::Error)]
enum Unwelcome {
    #[error("it speaks protocol versions {theirs} (godwit {release}), expected one of {ours}")]
    Version {
        ours: String,
        theirs: String,
        release: String,
    },
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("no random numbers for a token")]
    Random(#[source] std::io::Error),
    #[error("no answer yet: the guest is about to run")]
    Undecided,
}

/// A connection that is being heard.
struct Guest {
    /// Empty once it has said what it wants.
    connection: Arc<Mutex<Option<Arc<Connection>>>>,
    deadline: Instant,
    thread: Thread,
}

impl Door {
    pub(super) fn open(
        listener: Listener,
        desk: Arc<Desk>,
        options: ReceiveOptions,
    ) -> std::io::Result<Self> {
        let closing = Control::new()?;
        let hall = Arc::new(Hall {
            desk,
            options,
            closing,
        });
        let inside = hall.clone();
        let thread = threads::spawn(Role::Door, "door", move || inside.run(&listener))?;
        Ok(Self {
            hall,
            thread: Some(thread),
        })
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.hall.closing.cancel();
        self.hall.desk.close();
        if let Some(thread) = self.thread.take() {
            // A panic of its own has been printed.
            let _ = thread.join();
        }
    }
}

impl Hall {
    fn run(self: &Arc<Self>, listener: &Listener) {
        let mut guests: Vec<Guest> = Vec::new();
        loop {
            guests.retain(|guest| !guest.thread.is_finished());
            let now = Instant::now();
            guests
                .iter()
                .filter(|guest| guest.deadline <= now)
                .for_each(Guest::show_out);
            let next = guests
                .iter()
                .filter(|guest| guest.is_heard())
                .map(|guest| guest.deadline)
                .min();
            match listener.accept(&self.closing, next) {
                Ok(Some(connection)) => self.let_in(connection, &mut guests),
                Ok(None) => {}
                Err(TransportError::Cancelled) => break,
                Err(error) => {
                    tracing::warn!(error = chain(&error), "no connection accepted");
                    self.closing.wait_for_cancel(ACCEPT_AGAIN);
                }
            }
        }
        for guest in guests {
            guest.show_out();
            let _ = guest.thread.join();
        }
    }

    fn let_in(self: &Arc<Self>, connection: Connection, guests: &mut Vec<Guest>) {
        if guests.len() >= MOST_GUESTS {
            let silent = guests.iter().find(|guest| guest.is_heard());
            // A thread that was told to end does so at once, but not before it runs.
            let Some(silent) = silent.filter(|_| guests.len() < MOST_THREADS) else {
                tracing::warn!(
                    from = %connection.peer(),
                    "too many connections at a time; one is refused"
                );
                return;
            };
            silent.show_out();
        }
        let connection = Arc::new(Mutex::new(Some(Arc::new(connection))));
        let (hall, theirs) = (self.clone(), connection.clone());
        let spawned = threads::spawn(Role::Greeting, "greeting", move || hall.greet(&theirs));
        match spawned {
            Ok(thread) => guests.push(Guest {
                connection,
                deadline: Instant::now() + GREETING,
                thread,
            }),
            Err(error) => tracing::warn!(%error, "no thread to hear a connection"),
        }
    }

    /// Hears one connection.
    fn greet(&self, slot: &Mutex<Option<Arc<Connection>>>) {
        let Some(connection) = lock(slot).clone() else {
            return;
        };
        let mut link = Link::new(&connection, &self.closing, GREETING, GREETING);
        if let Err(error) = self.hear(&mut link, slot, &connection) {
            let reason = chain(&error);
            tracing::info!(from = %connection.peer(), "connection refused: {reason}");
            link.abort(false, &reason);
        }
    }

    fn hear(
        &self,
        link: &mut Link<'_>,
        slot: &Mutex<Option<Arc<Connection>>>,
        connection: &Arc<Connection>,
    ) -> Result<(), Unwelcome> {
        hello(link)?;
        let what = "begin, join or ask";
        let wish = link.receive_message(what)?;
        // It has said what it wants: from here on it is not the door's to end.
        if lock(slot).take().is_none() {
            return Ok(());
        }
        match wish {
            Message::Begin(features) => {
                let arrival = Arrival {
                    connection: connection.clone(),
                    token: new_token()?,
                    features,
                };
                Ok(self.desk.begin(arrival, Instant::now() + GREETING)?)
            }
            Message::Join { token, index } => Ok(self.desk.join(token, index, connection.clone())?),
            Message::Ask(token) => {
                let until = Instant::now() + self.options.io_timeout;
                let outcome = self.desk.ask(token, until).ok_or(Unwelcome::Undecided)?;
                tracing::info!(
                    from = %connection.peer(),
                    ?outcome,
                    "a source asked for its machine"
                );
                link.send(&Message::Outcome(outcome))?;
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

impl Guest {
    /// Whether it has not said yet what it wants.
    fn is_heard(&self) -> bool {
        lock(&self.connection).is_some()
    }

    /// Ends it, unless it has said what it wants.
    fn show_out(&self) {
        if let Some(connection) = lock(&self.connection).take() {
            tracing::info!(from = %connection.peer(), "a connection did not say what it wants");
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that holds it panics.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn hello(link: &mut Link<'_>) -> Result<(), Unwelcome> {
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
        None => Err(Unwelcome::Version {
            ours: Hello::ours().versions(),
            theirs: theirs.versions(),
            release: clean(&theirs.release),
        }),
    }
}

fn new_token() -> Result<Token, Unwelcome> {
    use rustix::rand::{GetRandomFlags, getrandom};
    let mut token = Token::default();
    // Up to 256 bytes come whole, once the system has any (getrandom(2)).
    match getrandom(&mut token[..], GetRandomFlags::empty()) {
        Ok(got) if got == token.len() => Ok(token),
        Ok(_) => Err(Unwelcome::Random(std::io::ErrorKind::UnexpectedEof.into())),
        Err(error) => Err(Unwelcome::Random(error.into())),
    }
}
