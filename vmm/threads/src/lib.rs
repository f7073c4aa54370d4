//! How threads start: with a role and a name, and so that a panic in one is reported.
//!
//! See `DESIGN.md` beside this crate's manifest.

// The one place that starts threads.
#![allow(clippy::disallowed_methods)]
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

use std::any::Any;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Runs a vCPU.
    Vcpu,
    /// Keeps vCPUs out of the guest for a part of the time.
    Throttle,
    /// Serves the devices.
    Devices,
    /// Serves the API.
    Api,
    /// Carries the guest's console to standard output.
    Console,
    /// Carries standard input to the guest's console.
    Input,
    /// Writes the log, or other lines.
    Log,
    /// Waits for the end of the process that brings guest memory's pages.
    FaultHandler,
    /// Brings guest memory's pages itself.
    Pages,
    /// A job of the supervisor's: a migration away.
    Migration,
    /// A job of the supervisor's: waits for a machine and takes it.
    Receive,
    /// A job of the supervisor's: puts the machine in files.
    Snapshot,
    /// A job of the supervisor's: takes the machine out of files.
    Restore,
    /// A job of the supervisor's: what takes its time with the machine.
    Operation,
    /// A job of the supervisor's: asks the other side of a migration in doubt.
    Resolve,
    /// A job of the supervisor's: asks a destination that may wait for "go", so that it gives the machine up.
    Withdraw,
    /// Sends or receives the pages of a migration.
    Stream,
    /// Serves a migration's control connection beside its job.
    Control,
    /// Accepts the connections of a receiver.
    Acceptor,
    /// Reads from a connection what it is for.
    Greeting,
    /// Does a part of the work of another thread, which waits for its end.
    Helper,
}

/// A thread that ended as it should not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What it was for.
    pub role: Role,
    /// Its name.
    pub name: String,
    /// The panic's message, or why the thread ended.
    pub reason: String,
}

/// A thread's handle: it yields what the thread returned, or how it failed.
pub type Thread<T = ()> = JoinHandle<Result<T, Failure>>;
/// The same of a thread within a scope.
pub type ScopedThread<'scope, T = ()> = ScopedJoinHandle<'scope, Result<T, Failure>>;

type FailureListener = Arc<dyn Fn(Failure) + Send + Sync>;

static LISTENER: Mutex<Option<FailureListener>> = Mutex::new(None);

/// From here on `listener` is called for every thread that fails, on that thread and before its end. There is one
/// listener: the last.
pub fn report_failures_to(listener: impl Fn(Failure) + Send + Sync + 'static) {
    *LISTENER.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(listener));
}

/// Tells the listener of a failure that was no panic.
pub fn report(failure: Failure) {
    let listener = LISTENER.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(listener) = listener {
        listener(failure);
    }
}

/// Starts a thread.
pub fn spawn<T: Send + 'static>(
    role: Role,
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Thread<T>> {
    let name = name.into();
    Builder::new()
        .name(name.clone())
        .spawn(move || run(role, name, body))
}

/// Starts a thread that ends before `scope` does.
pub fn spawn_scoped<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    role: Role,
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'scope,
) -> io::Result<ScopedThread<'scope, T>> {
    let name = name.into();
    Builder::new()
        .name(name.clone())
        .spawn_scoped(scope, move || run(role, name, body))
}

/// What a thread yielded that was joined.
pub fn joined<T>(joined: std::thread::Result<Result<T, Failure>>) -> Result<T, Failure> {
    // No panic gets as far as here; that of a listener might.
    joined.unwrap_or_else(|panic| {
        Err(Failure {
            role: Role::Helper,
            name: String::new(),
            reason: panic_message(&*panic),
        })
    })
}

/// The message of a panic.
pub fn panic_message(panic: &(dyn Any + Send)) -> String {
    if let Some(message) = panic.downcast_ref::<&str>() {
        (*message).into()
    } else if let Some(message) = panic.downcast_ref::<String>() {
        message.clone()
    } else {
        "no message".into()
    }
}

fn run<T>(role: Role, name: String, body: impl FnOnce() -> T) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(body)).map_err(|panic| {
        let failure = Failure {
            role,
            name,
            reason: format!("panicked: {}", panic_message(&*panic)),
        };
        report(failure.clone());
        failure
    })
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "thread {:?} {}", self.name, self.reason)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// One test, because the process has one listener.
    #[test]
    fn a_panic_is_reported_and_ends_no_other_thread() {
        let (sender, failures) = mpsc::channel();
        report_failures_to(move |failure| sender.send(failure).unwrap());
        let failing = spawn(Role::Devices, "devices", || -> u32 { panic!("planted") }).unwrap();
        let failure = joined(failing.join()).unwrap_err();
        assert_eq!(failure.to_string(), r#"thread "devices" panicked: planted"#);
        assert_eq!(failures.recv().unwrap(), failure);

        let seven = spawn(Role::Helper, "seven", || {
            assert_eq!(std::thread::current().name(), Some("seven"));
            7
        });
        assert_eq!(joined(seven.unwrap().join()), Ok(7));

        // The scope returns although no thread was joined.
        std::thread::scope(|scope| {
            spawn_scoped(scope, Role::Stream, "stream 3", || {
                panic!("at {}", 3);
            })
            .unwrap();
        });
        let failure = failures.recv().unwrap();
        assert_eq!(
            (failure.role, failure.reason.as_str()),
            (Role::Stream, "panicked: at 3")
        );

        let ended = Failure {
            role: Role::Api,
            name: "api".into(),
            reason: "has ended".into(),
        };
        report(ended.clone());
        assert_eq!(failures.recv().unwrap(), ended);
        assert!(failures.try_recv().is_err());
    }
}
