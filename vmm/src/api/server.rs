//! The API thread: the only place with tokio.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

use super::routes::{Context, router};
use crate::console::{Console, ConsoleInput, terminal_size};
use crate::rundir::ApiSocket;
use crate::supervisor::{Event, SupervisorHandle};

/// How long requests in flight may take when the server ends.
const GRACE: Duration = Duration::from_secs(2);

/// A running API server. Dropping it ends it, after requests in flight have been answered.
pub struct ApiServer {
    end: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
    socket: ApiSocket,
    input: ConsoleInput,
    /// Raised when the process goes on after it was stopped.
    continued: Arc<OwnedFd>,
}

impl ApiServer {
    /// Serves `socket` on a thread of its own. The thread also turns SIGTERM, SIGINT and SIGHUP into events for
    /// the supervisor, and tells the guest of the terminal's size at SIGWINCH.
    pub fn start(socket: ApiSocket, supervisor: SupervisorHandle, console: Console) -> io::Result<Self> {
        let listener = socket.listener().try_clone()?;
        listener.set_nonblocking(true)?;
        let end = Arc::new(Notify::new());
        let input = ConsoleInput::default();
        let context = Context {
            supervisor,
            console,
            input: input.clone(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        // Inside the runtime, but before the thread starts, so that an error is the caller's.
        let continued = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let raise = continued.clone();
        let (listener, signals, resized, continues) = {
            let _inside = runtime.enter();
            let resized = signal(SignalKind::window_change())?;
            let continues = signal(SignalKind::from_raw(libc::SIGCONT))?;
            (
                UnixListener::from_std(listener)?,
                end_signals()?,
                resized,
                continues,
            )
        };
        let ended = end.clone();
        let thread = std::thread::Builder::new().name("api".into()).spawn(move || {
            runtime.block_on(async move {
                for mut signal in signals {
                    let supervisor = context.supervisor.clone();
                    tokio::spawn(async move {
                        while signal.recv().await.is_some() {
                            supervisor.send(Event::Terminate);
                        }
                    });
                }
                tokio::spawn(pass_size_on(resized, context.input.clone()));
                tokio::spawn(pass_on(continues, raise));
                serve(listener, context, ended).await;
            });
            runtime.shutdown_background();
        })?;
        Ok(Self {
            end,
            thread: Some(thread),
            socket,
            input,
            continued,
        })
    }

    /// Where console input goes once there is a machine.
    pub fn console_input(&self) -> &ConsoleInput {
        &self.input
    }

    /// Raised when this process goes on after it was stopped.
    pub fn continued(&self) -> &Arc<OwnedFd> {
        &self.continued
    }

    /// The socket that is served.
    pub fn socket(&self) -> &ApiSocket {
        &self.socket
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.end.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic in it has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Raises `event` for each signal.
async fn pass_on(mut signal: Signal, event: Arc<OwnedFd>) {
    while signal.recv().await.is_some() {
        // Where it is full, it is raised already.
        let _ = rustix::io::write(&event, &1u64.to_ne_bytes());
    }
}

/// Tells the guest of the size of the terminal that this process was started on, and of every change.
async fn pass_size_on(mut resized: Signal, input: ConsoleInput) {
    loop {
        if let Some(size) = terminal_size() {
            input.resize(size);
        }
        if resized.recv().await.is_none() {
            return;
        }
    }
}

/// The signals that ask for the end, but for those that whoever started this process has it ignore: a shell does
/// so with SIGINT for a background job, which Ctrl-C on the foreground job is not meant for.
fn end_signals() -> io::Result<Vec<Signal>> {
    let ignored = std::fs::read_to_string("/proc/self/status").map_or(0, |status| ignored_signals(&status));
    let kinds = [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
    ];
    let heard = |kind: &SignalKind| ignored >> (kind.as_raw_value() - 1) & 1 == 0;
    kinds.into_iter().filter(heard).map(signal).collect()
}

/// The mask of ignored signals in a process's status: bit n - 1 is signal n (proc_pid_status(5)).
fn ignored_signals(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

async fn serve(listener: UnixListener, context: Context, end: Arc<Notify>) {
    let ending = Arc::new(Notify::new());
    let shutdown = {
        let ending = ending.clone();
        async move {
            end.notified().await;
            ending.notify_one();
        }
    };
    let server = axum::serve(listener, router(context)).with_graceful_shutdown(shutdown);
    let deadline = async {
        ending.notified().await;
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        result = async { server.await } => {
            if let Err(error) = result {
                tracing::error!(%error, "API server");
            }
        }
        () = deadline => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_of_ignored_signals() {
        let status = "Name:\tgodwit\nSigBlk:\tffff\nSigIgn:\t0000000000001002\nSigCgt:\t01\n";
        assert_eq!(ignored_signals(status), 0x1002);
        assert_eq!(ignored_signals(""), 0);
    }
}
