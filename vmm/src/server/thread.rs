//! The API thread: the only place with tokio.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::rundir::ApiSocket;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::event::{EventfdFlags, eventfd};
use threads::{Role, Thread};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::sleep;

use super::routes::{Context, router};
use crate::console::{Console, ConsoleInput, terminal_size};
use crate::supervisor::{Event, SupervisorHandle};

/// How long requests in flight may take when the server ends.
const GRACE: Duration = Duration::from_secs(2);
/// Connections that are served at a time; one more gets an error and is closed.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take for the head of a request, the time before it included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// The pause after an accept that failed, e.g. for want of file descriptors: there is no event when there are some
/// again.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// How often a thread that failed is replaced.
const MAX_RESTARTS: u32 = 3;
/// The answer to a connection too many.
const TOO_MANY: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: 62\r\n\
    Connection: close\r\n\r\n{\"fault_message\":\"too many connections at a time, at most 64\"}";

/// A running API server. Dropping it ends it, after requests in flight have been answered.
pub struct ApiServer {
    serving: Mutex<Serving>,
    socket: ApiSocket,
    context: Context,
    /// Raised when the process goes on after it was stopped.
    continued: Arc<OwnedFd>,
}

/// The thread that serves.
struct Serving {
    thread: Option<Thread>,
    /// Tells it to end.
    end: Arc<Notify>,
    /// How many before it have failed.
    failed: u32,
}

impl ApiServer {
    /// Serves `socket` on a thread of its own. The thread also turns SIGTERM, SIGINT and SIGHUP into events for
    /// the supervisor, and passes the terminal's size on to the guest at SIGWINCH.
    pub fn start(socket: ApiSocket, supervisor: SupervisorHandle, console: Console) -> io::Result<Self> {
        let context = Context::new(supervisor, console);
        let continued = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        Ok(Self {
            serving: Mutex::new(start_thread(&socket, &context, &continued)?),
            socket,
            context,
            continued,
        })
    }

    /// Goes on serving after the thread has failed; an error if that has been too often.
    pub(crate) fn restart(&self) -> io::Result<()> {
        let mut serving = self.lock();
        if serving.failed >= MAX_RESTARTS {
            return Err(io::Error::other(format!(
                "its thread has failed {} times before",
                serving.failed
            )));
        }
        let failed = serving.failed + 1;
        // The one that failed ends by itself.
        *serving = Serving {
            failed,
            ..start_thread(&self.socket, &self.context, &self.continued)?
        };
        Ok(())
    }

    /// Where console input goes once there is a machine.
    pub fn console_input(&self) -> &ConsoleInput {
        &self.context.input
    }

    /// Raised when this process goes on after it was stopped.
    pub fn continued(&self) -> &Arc<OwnedFd> {
        &self.continued
    }

    /// The socket that is served.
    pub fn socket(&self) -> &ApiSocket {
        &self.socket
    }

    fn lock(&self) -> MutexGuard<'_, Serving> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        let mut serving = self.lock();
        serving.end.notify_one();
        let thread = serving.thread.take();
        drop(serving);
        if let Some(thread) = thread {
            // If the thread failed, the supervisor has the event.
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

fn start_thread(socket: &ApiSocket, context: &Context, continued: &Arc<OwnedFd>) -> io::Result<Serving> {
    let end = Arc::new(Notify::new());
    let listener = socket.listener().try_clone()?;
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // Inside the runtime, but before the thread starts, so that an error is the caller's.
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
    let (context, ended) = (context.clone(), end.clone());
    let thread = threads::spawn(Role::Api, "api", move || {
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
            serve(listener, context, &ended, HEAD_TIMEOUT).await;
        });
        runtime.shutdown_background();
    })?;
    Ok(Serving {
        thread: Some(thread),
        end,
        failed: 0,
    })
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

/// The signals that ask for the end, except those that the process which started this one made it ignore: a shell does
/// so with SIGINT for a background job, because Ctrl-C is meant for the foreground job.
fn end_signals() -> io::Result<Vec<Signal>> {
    let ignored = std::fs::read_to_string("/proc/self/status").map_or(0, |status| ignored_signals(&status));
    let kinds = [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
    ];
    let is_handled = |kind: &SignalKind| ignored >> (kind.as_raw_value() - 1) & 1 == 0;
    kinds.into_iter().filter(is_handled).map(signal).collect()
}

/// The mask of ignored signals in a process's status: bit n - 1 is signal n (proc_pid_status(5)).
fn ignored_signals(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

/// Until `end` is notified, and requests in flight have been answered.
async fn serve(listener: UnixListener, context: Context, end: &Notify, head_timeout: Duration) {
    let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let (open, closed) = watch::channel(());
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(head_timeout);
    let service = TowerToHyperService::new(router(context.clone()));
    loop {
        let accepted = tokio::select! {
            () = end.notified() => break,
            accepted = listener.accept() => accepted,
        };
        #[cfg(test)]
        assert!(
            !context.planted.swap(false, std::sync::atomic::Ordering::Relaxed),
            "planted"
        );
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "API: no connection accepted");
                sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let Ok(place) = free.clone().try_acquire_owned() else {
            refuse(stream);
            continue;
        };
        let connection = http.serve_connection(TokioIo::new(stream), service.clone());
        let mut closed = closed.clone();
        tokio::spawn(async move {
            let mut connection = pin!(connection.with_upgrades());
            let served = tokio::select! {
                served = connection.as_mut() => served,
                _ = closed.changed() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = served {
                tracing::debug!(%error, "API: a connection broke off");
            }
            drop(place);
        });
    }
    drop(open);
    let all = free.acquire_many(MAX_CONNECTIONS as u32);
    // A client that has no answer by then gets none.
    let _ = tokio::time::timeout(GRACE, all).await;
}

/// Answers that there are too many connections, without waiting for the client.
fn refuse(stream: UnixStream) {
    // It still does not block; tokio knows nothing yet of what it is ready for.
    if let Ok(mut stream) = stream.into_std() {
        // What was not read would make the client miss the answer.
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write(TOO_MANY);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream as Stream;
    use std::sync::atomic::Ordering;
    use std::sync::mpsc;

    use super::*;
    use crate::testing::{keep_failures, wait_for_failure};

    fn server() -> (ApiServer, tempfile::TempDir) {
        keep_failures();
        let directory = tempfile::tempdir().unwrap();
        let socket = ApiSocket::bind(&directory.path().join("vm.sock")).unwrap();
        // There is no supervisor; no request here needs one.
        let supervisor = SupervisorHandle::new(mpsc::channel().0);
        let server = ApiServer::start(socket, supervisor, Console::detached()).unwrap();
        (server, directory)
    }

    fn connect(directory: &tempfile::TempDir) -> Stream {
        let stream = Stream::connect(directory.path().join("vm.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// The status of the answer to a request on that connection; nothing if it is closed instead.
    fn ask(mut stream: &Stream) -> String {
        let _ = stream.write_all(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let mut answer = [0; 1024];
        let count = stream.read(&mut answer).unwrap_or(0);
        let answer = String::from_utf8_lossy(&answer[..count]);
        answer.split(' ').nth(1).unwrap_or_default().into()
    }

    #[test]
    fn one_connection_too_many_gets_an_error() {
        let (_server, directory) = server();
        let mut open: Vec<_> = (0..MAX_CONNECTIONS).map(|_| connect(&directory)).collect();
        assert!(open.iter().all(|stream| ask(stream) == "200"));
        let mut response = String::new();
        connect(&directory).read_to_string(&mut response).unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
        assert!(
            head.contains(&format!("Content-Length: {}\r\n", body.len())),
            "{response}"
        );
        // A place that is given up is another's.
        open.clear();
        while ask(&connect(&directory)) != "200" {}
    }

    #[test]
    fn a_connection_that_says_nothing_is_closed() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        runtime.block_on(async {
            let listener = UnixListener::bind(&path).unwrap();
            let context = Context::new(SupervisorHandle::new(mpsc::channel().0), Console::detached());
            let end = Notify::new();
            let silent = tokio::task::spawn_blocking(move || {
                let idle = Stream::connect(&path).unwrap();
                let mut slow = Stream::connect(&path).unwrap();
                slow.write_all(b"GET /version HTTP/1.1\r\nHo").unwrap();
                let again = Stream::connect(&path).unwrap();
                assert_eq!(ask(&again), "200");
                for mut stream in [idle, slow, again] {
                    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                    stream.read_to_end(&mut Vec::new()).unwrap();
                }
            });
            tokio::select! {
                () = serve(listener, context, &end, Duration::from_millis(50)) => unreachable!(),
                ended = silent => ended.unwrap(),
            }
        });
    }

    #[test]
    fn a_thread_that_failed_is_replaced_a_few_times() {
        let (server, directory) = server();
        for _ in 0..MAX_RESTARTS {
            server.context.planted.store(true, Ordering::Relaxed);
            connect(&directory).read_to_end(&mut Vec::new()).unwrap();
            assert_eq!(wait_for_failure(Role::Api).reason, "panicked: planted");
            server.restart().unwrap();
            assert_eq!(ask(&connect(&directory)), "200");
        }
        assert!(server.restart().is_err());
    }

    #[test]
    fn the_mask_of_ignored_signals() {
        let status = "Name:\tgodwit\nSigBlk:\tffff\nSigIgn:\t0000000000001002\nSigCgt:\t01\n";
        assert_eq!(ignored_signals(status), 0x1002);
        assert_eq!(ignored_signals(""), 0);
    }
}
