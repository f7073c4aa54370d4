//! The routes: each turns HTTP into one request to the supervisor.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use api::{
    Action, ActionType, BalloonStatistics, BalloonUpdate, CONSOLE_PROTOCOL, ConsoleSize, DriveUpdate, Fault,
    InstanceInfo, Metrics, MigrationEvent, MigrationRequest, RequestError, Resolution, ResolveRequest,
    SnapshotReport, SnapshotRequest, VERSION, Version, VmState, VmUpdate,
};
use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Path, Request as HttpRequest, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, put};
use devices::virtio::console::TerminalSize;
use hyper_util::rt::TokioIo;
use migration::Progress;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::balloon;
use crate::console::{Console, ConsoleInput};
use crate::supervisor::{MigrationFeed, Refusal, Request, SupervisorHandle};

/// How often a migration's stream has a line.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// Most samples of one line of a migration's stream.
const SAMPLES_IN_A_LINE: usize = 1024;
/// Most bytes read at once from a console client.
const INPUT_CHUNK: usize = 4096;
/// Clients of the console at a time.
const MAX_CONSOLES: usize = 16;

/// What the routes work with.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) supervisor: SupervisorHandle,
    pub(super) console: Console,
    pub(super) input: ConsoleInput,
    /// Places for clients of the console.
    consoles: Arc<Semaphore>,
    /// Whether a test has the thread panic at the next connection.
    #[cfg(test)]
    pub(super) planted: Arc<std::sync::atomic::AtomicBool>,
}

impl Context {
    pub(super) fn new(supervisor: SupervisorHandle, console: Console) -> Self {
        Self {
            supervisor,
            console,
            input: ConsoleInput::default(),
            consoles: Arc::new(Semaphore::new(MAX_CONSOLES)),
            #[cfg(test)]
            planted: Arc::default(),
        }
    }
}

pub(super) fn router(context: Context) -> Router {
    Router::new()
        .route("/", get(info))
        .route("/version", get(version))
        .route("/vm", patch(update))
        .route("/actions", put(action))
        .route("/migration", put(migrate).get(progress).delete(cancel))
        .route("/migration/resolve", put(resolve))
        .route("/snapshot", put(snapshot).delete(cancel))
        .route("/balloon", patch(set_balloon))
        .route("/balloon/statistics", get(balloon_statistics))
        .route("/metrics", get(metrics))
        .route("/drives/{id}", patch(update_drive))
        .route("/console", get(console))
        .route("/console/size", put(resize_console))
        .fallback(unknown_route)
        .method_not_allowed_fallback(unknown_method)
        .with_state(context)
}

/// A refusal as a response.
struct HttpFailure(StatusCode, String);

impl IntoResponse for HttpFailure {
    fn into_response(self) -> Response {
        (
            self.0,
            Json(Fault {
                fault_message: self.1,
            }),
        )
            .into_response()
    }
}

impl From<Refusal> for HttpFailure {
    fn from(refusal: Refusal) -> Self {
        let status = match refusal {
            Refusal::NoMigration | Refusal::NoBalloon | Refusal::NoDisk(_) => StatusCode::NOT_FOUND,
            Refusal::Migrating
            | Refusal::Snapshotting
            | Refusal::Stopping
            | Refusal::NoMachine
            | Refusal::InDoubt
            | Refusal::InDoubtStays
            | Refusal::NoDoubt
            | Refusal::Resolving
            | Refusal::NotTakenBack
            | Refusal::NothingToDecide => StatusCode::CONFLICT,
            Refusal::Failed(_) | Refusal::Gone => StatusCode::BAD_REQUEST,
        };
        HttpFailure(status, refusal.to_string())
    }
}

impl From<RequestError> for HttpFailure {
    fn from(error: RequestError) -> Self {
        HttpFailure(StatusCode::BAD_REQUEST, error.to_string())
    }
}

type ApiResult<T> = Result<T, HttpFailure>;

/// How long a request's body may take, however slowly it comes: until it is there it holds one of the connections.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A body of JSON, whatever its header says: Firecracker's clients often have none, and curl calls it a form.
struct JsonBody<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = HttpFailure;

    async fn from_request(request: HttpRequest, state: &S) -> ApiResult<Self> {
        let bytes = tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, state))
            .await
            .map_err(|_| {
                let message = format!("expected the request's body within {BODY_TIMEOUT:?}");
                HttpFailure(StatusCode::REQUEST_TIMEOUT, message)
            })?
            .map_err(|rejection| HttpFailure(rejection.status(), rejection.body_text()))?;
        let Json(body) = Json::from_bytes(&bytes)
            .map_err(|rejection| HttpFailure(StatusCode::BAD_REQUEST, rejection.body_text()))?;
        Ok(Self(body))
    }
}

async fn unknown_route(method: Method, uri: Uri) -> HttpFailure {
    HttpFailure(
        StatusCode::NOT_FOUND,
        format!("no such route: {method} {}", uri.path()),
    )
}

async fn unknown_method(method: Method, uri: Uri) -> HttpFailure {
    let message = format!("{} has no {method}", uri.path());
    HttpFailure(StatusCode::METHOD_NOT_ALLOWED, message)
}

async fn info(State(context): State<Context>) -> ApiResult<Json<InstanceInfo>> {
    Ok(Json(context.supervisor.request(Request::Info).await?))
}

async fn version() -> Json<Version> {
    Json(Version {
        godwit_version: VERSION.into(),
        firecracker_version: VERSION.into(),
    })
}

async fn update(State(context): State<Context>, JsonBody(body): JsonBody<VmUpdate>) -> ApiResult<StatusCode> {
    match body.state {
        VmState::Paused => context.supervisor.request(Request::Pause).await?,
        VmState::Resumed => context.supervisor.request(Request::Resume).await?,
    }
    Ok(StatusCode::NO_CONTENT)
}

async fn action(State(context): State<Context>, JsonBody(body): JsonBody<Action>) -> ApiResult<StatusCode> {
    let Action { action_type, force } = body;
    match action_type {
        ActionType::SendCtrlAltDel => context.supervisor.request(Request::PowerButton).await?,
        ActionType::Stop => {
            context
                .supervisor
                .request(|reply| Request::Stop { force, reply })
                .await?
        }
    }
    Ok(StatusCode::NO_CONTENT)
}

async fn migrate(
    State(context): State<Context>,
    JsonBody(request): JsonBody<MigrationRequest>,
) -> ApiResult<Response> {
    let (destination, options) = request.check()?;
    let options = Box::new(options);
    let feed = context
        .supervisor
        .request(|reply| Request::Migrate {
            destination,
            options,
            reply,
        })
        .await?;
    let (lines, stream) = mpsc::channel::<Result<Bytes, Infallible>>(16);
    tokio::spawn(stream_progress(feed, lines));
    let body = Body::from_stream(ReceiverStream::new(stream));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

/// Writes lines while the migration goes on: the picture, every sample of its trace, and at last the report.
/// The migration goes on whether the client reads them or not.
async fn stream_progress(mut feed: MigrationFeed, lines: mpsc::Sender<Result<Bytes, Infallible>>) {
    let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
    let mut sent = 0;
    loop {
        let report = tokio::select! {
            report = feed.report.recv() => match report {
                Ok(report) => Some(report),
                Err(_) => return,
            },
            _ = ticks.tick() => None,
        };
        let samples = feed.control.samples(sent);
        sent += samples.len();
        let mut events: Vec<_> = samples
            .chunks(SAMPLES_IN_A_LINE)
            .map(|samples| MigrationEvent::Samples(samples.to_vec()))
            .collect();
        let last = report.is_some();
        events.push(match report {
            Some(report) => MigrationEvent::Report(Box::new(report)),
            None => MigrationEvent::Progress(feed.control.progress()),
        });
        for event in &events {
            let Ok(mut line) = serde_json::to_vec(event) else {
                return;
            };
            line.push(b'\n');
            if lines.send(Ok(line.into())).await.is_err() {
                return;
            }
        }
        if last {
            return;
        }
    }
}

async fn progress(State(context): State<Context>) -> ApiResult<Json<Progress>> {
    Ok(Json(context.supervisor.request(Request::Progress).await?))
}

async fn cancel(State(context): State<Context>) -> ApiResult<StatusCode> {
    context.supervisor.request(Request::Cancel).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn resolve(
    State(context): State<Context>,
    JsonBody(body): JsonBody<ResolveRequest>,
) -> ApiResult<Json<Resolution>> {
    let ResolveRequest { decision } = body;
    let resolution = context
        .supervisor
        .request(|reply| Request::Resolve(decision, reply))
        .await?;
    Ok(Json(resolution))
}

async fn snapshot(
    State(context): State<Context>,
    JsonBody(request): JsonBody<SnapshotRequest>,
) -> ApiResult<Json<SnapshotReport>> {
    request.check()?;
    let report = context
        .supervisor
        .request(|reply| Request::Snapshot(request, reply))
        .await?;
    Ok(Json(report))
}

async fn set_balloon(
    State(context): State<Context>,
    JsonBody(body): JsonBody<BalloonUpdate>,
) -> ApiResult<StatusCode> {
    let BalloonUpdate { amount_mib } = body;
    let bytes = amount_mib.saturating_mul(1 << 20);
    context
        .supervisor
        .request(|reply| Request::SetBalloon(bytes, reply))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn balloon_statistics(State(context): State<Context>) -> ApiResult<Json<BalloonStatistics>> {
    let balloon = context.supervisor.request(Request::Balloon).await?;
    Ok(Json(balloon::statistics(&balloon).await))
}

async fn metrics(State(context): State<Context>) -> ApiResult<Json<Metrics>> {
    Ok(Json(context.supervisor.request(Request::Metrics).await?))
}

async fn update_drive(
    State(context): State<Context>,
    Path(id): Path<String>,
    JsonBody(update): JsonBody<DriveUpdate>,
) -> ApiResult<StatusCode> {
    if update.drive_id != id {
        let message = format!(
            "expected drive_id {id:?} as in the path, got {:?}",
            update.drive_id
        );
        return Err(HttpFailure(StatusCode::BAD_REQUEST, message));
    }
    let update = Box::new(update);
    context
        .supervisor
        .request(|reply| Request::UpdateDisk(update, reply))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn console(State(context): State<Context>, request: HttpRequest) -> ApiResult<Response> {
    let asked = request.headers().get(header::UPGRADE).map(HeaderValue::as_bytes);
    if asked != Some(CONSOLE_PROTOCOL.as_bytes()) {
        let message = format!("expected the header `Upgrade: {CONSOLE_PROTOCOL}`");
        return Err(HttpFailure(StatusCode::UPGRADE_REQUIRED, message));
    }
    let Ok(place) = context.consoles.clone().try_acquire_owned() else {
        let message = format!("expected at most {MAX_CONSOLES} clients of the console at a time");
        return Err(HttpFailure(StatusCode::SERVICE_UNAVAILABLE, message));
    };
    tokio::spawn(async move {
        match hyper::upgrade::on(request).await {
            Ok(upgraded) => serve_console(TokioIo::new(upgraded), context).await,
            Err(error) => tracing::debug!(%error, "console client did not upgrade"),
        }
        drop(place);
    });
    let headers = [
        (header::UPGRADE, CONSOLE_PROTOCOL),
        (header::CONNECTION, "Upgrade"),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

async fn resize_console(
    State(context): State<Context>,
    JsonBody(size): JsonBody<ConsoleSize>,
) -> ApiResult<StatusCode> {
    let ConsoleSize { columns, rows } = size;
    context.input.resize(TerminalSize { columns, rows });
    Ok(StatusCode::NO_CONTENT)
}

/// Until either side ends.
async fn serve_console<S>(stream: S, context: Context)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut console = context.console.attach();
    let output = async {
        loop {
            // What is not taken in time is lost, as on a real serial line.
            writer.write_all(&console.next().await).await?;
        }
    };
    let input = async {
        let mut chunk = vec![0; INPUT_CHUNK];
        loop {
            let count = reader.read(&mut chunk).await?;
            if count == 0 {
                return Ok(());
            }
            send_input(&context.input, &chunk[..count]).await;
        }
    };
    let ended: std::io::Result<()> = tokio::select! {
        result = output => result,
        result = input => result,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "console client left");
    }
}

async fn send_input(input: &ConsoleInput, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        bytes = &bytes[input.offer(bytes)..];
        if !bytes.is_empty() {
            tokio::time::sleep(ConsoleInput::RETRY).await;
        }
    }
}
