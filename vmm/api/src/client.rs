//! A small client for the API, as the command line uses it.
//!
//! No request waits for ever: a VM whose process is stopped, or hangs, gives no answer in time, and that is an error.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;

use super::CONSOLE_PROTOCOL;
use super::types::Fault;

/// How long to wait for an answer by default: a VM answers soon unless the request needs its guest.
pub const ANSWER: Duration = Duration::from_secs(10);
/// How long between two lines of a stream, of which there are ten a second.
const NEXT_LINE: Duration = Duration::from_secs(30);

/// Why a request had no good answer.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum ClientError {
    #[error("API socket {path}")]
    Connect { path: PathBuf, source: io::Error },
    #[error("API socket {path}")]
    Http { path: PathBuf, source: hyper::Error },
    #[error("API socket {path}: expected JSON")]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("API socket {path}: no answer within {after:?}; its process hangs, or is stopped")]
    NoAnswer { path: PathBuf, after: Duration },
    #[error("{message}")]
    Refused { status: StatusCode, message: String },
}

/// A client of one VM's API.
pub struct Client {
    path: PathBuf,
    patience: Duration,
}

impl Client {
    /// For the socket at `path`.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.into(),
            patience: ANSWER,
        }
    }

    /// The same client, which waits this long for each answer.
    pub fn patient(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Sends a request and reads a JSON answer.
    pub async fn get<T: DeserializeOwned>(&self, route: &str) -> Result<T, ClientError> {
        let bytes = self.call(Method::GET, route, Bytes::new()).await?;
        serde_json::from_slice(&bytes).map_err(|source| self.json(source))
    }

    /// Sends a request whose answer has no content.
    pub async fn send_json<B: Serialize>(
        &self,
        method: Method,
        route: &str,
        body: &B,
    ) -> Result<(), ClientError> {
        let body = serde_json::to_vec(body).map_err(|source| self.json(source))?;
        self.call(method, route, body.into()).await?;
        Ok(())
    }

    /// Sends a request and reads a JSON answer.
    pub async fn put<B: Serialize, T: DeserializeOwned>(
        &self,
        route: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|source| self.json(source))?;
        let bytes = self.call(Method::PUT, route, body.into()).await?;
        serde_json::from_slice(&bytes).map_err(|source| self.json(source))
    }

    /// `DELETE route`.
    pub async fn delete(&self, route: &str) -> Result<(), ClientError> {
        self.call(Method::DELETE, route, Bytes::new()).await?;
        Ok(())
    }

    /// Sends a request and hands each line of the answer, parsed, to `on_line` as it arrives.
    pub async fn stream<B: Serialize, T: DeserializeOwned>(
        &self,
        route: &str,
        body: &B,
        mut on_line: impl FnMut(T),
    ) -> Result<(), ClientError> {
        let body = serde_json::to_vec(body).map_err(|source| self.json(source))?;
        let begin = self.request(Method::PUT, route, body.into(), None);
        let mut response = self.within(self.patience, begin).await?.into_body();
        let mut pending = Vec::new();
        while let Some(frame) = self
            .within(NEXT_LINE, async { Ok(response.frame().await) })
            .await?
        {
            let frame = frame.map_err(|source| self.http(source))?;
            pending.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                on_line(serde_json::from_slice(&line).map_err(|source| self.json(source))?);
            }
        }
        Ok(())
    }

    /// Opens the console: from here on the stream carries its bytes.
    pub async fn console(&self) -> Result<TokioIo<hyper::upgrade::Upgraded>, ClientError> {
        let begin = self.request(Method::GET, "/console", Bytes::new(), Some(CONSOLE_PROTOCOL));
        let response = self.within(self.patience, begin).await?;
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(|source| self.http(source))?;
        Ok(TokioIo::new(upgraded))
    }

    /// Sends a request and reads all of its answer.
    async fn call(&self, method: Method, route: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let call = async {
            let response = self.request(method, route, body, None).await?;
            self.collect(response.into_body()).await
        };
        self.within(self.patience, call).await
    }

    async fn within<T>(
        &self,
        patience: Duration,
        answer: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        match tokio::time::timeout(patience, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(ClientError::NoAnswer {
                path: self.path.clone(),
                after: patience,
            }),
        }
    }

    async fn request(
        &self,
        method: Method,
        route: &str,
        body: Bytes,
        upgrade: Option<&str>,
    ) -> Result<Response<Incoming>, ClientError> {
        let connect = |source: io::Error| {
            let path = self.path.clone();
            if source.kind() == io::ErrorKind::WouldBlock {
                // As many wait for it as the kernel lets: it takes no connections any more.
                let after = Duration::ZERO;
                return ClientError::NoAnswer { path, after };
            }
            ClientError::Connect { path, source }
        };
        let stream = UnixStream::connect(&self.path).await.map_err(connect)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|source| self.http(source))?;
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::builder()
            .method(method)
            .uri(route)
            .header(HOST, "localhost")
            .header(CONTENT_TYPE, "application/json");
        if let Some(protocol) = upgrade {
            request = request
                .header(UPGRADE, protocol)
                .header(hyper::header::CONNECTION, "Upgrade");
        }
        let request = request
            .body(Full::new(body))
            .map_err(|error| connect(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|source| self.http(source))?;
        let status = response.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let bytes = self.collect(response.into_body()).await?;
        let message = serde_json::from_slice::<Fault>(&bytes)
            .map_or_else(|_| format!("HTTP status {status}"), |fault| fault.fault_message);
        Err(ClientError::Refused { status, message })
    }

    async fn collect(&self, body: Incoming) -> Result<Bytes, ClientError> {
        Ok(body
            .collect()
            .await
            .map_err(|source| self.http(source))?
            .to_bytes())
    }

    fn http(&self, source: hyper::Error) -> ClientError {
        ClientError::Http {
            path: self.path.clone(),
            source,
        }
    }

    fn json(&self, source: serde_json::Error) -> ClientError {
        ClientError::Json {
            path: self.path.clone(),
            source,
        }
    }
}
