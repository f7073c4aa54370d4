//! A small client for the API, as the command line uses it.

use std::io;
use std::path::{Path, PathBuf};

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

use super::routes::CONSOLE_PROTOCOL;
use super::types::Fault;

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
    #[error("{message}")]
    Refused { status: StatusCode, message: String },
}

/// A client of one VM's API.
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// For the socket at `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.into() }
    }

    /// Sends a request and reads a JSON answer.
    pub async fn get<T: DeserializeOwned>(&self, route: &str) -> Result<T, ClientError> {
        let body = self.send(Method::GET, route, Bytes::new(), None).await?;
        let bytes = self.collect(body).await?;
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
        let response = self.send(method, route, body.into(), None).await?;
        self.collect(response).await?;
        Ok(())
    }

    /// Sends a request and reads a JSON answer.
    pub async fn put<B: Serialize, T: DeserializeOwned>(
        &self,
        route: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|source| self.json(source))?;
        let response = self.send(Method::PUT, route, body.into(), None).await?;
        let bytes = self.collect(response).await?;
        serde_json::from_slice(&bytes).map_err(|source| self.json(source))
    }

    /// `DELETE route`.
    pub async fn delete(&self, route: &str) -> Result<(), ClientError> {
        let response = self.send(Method::DELETE, route, Bytes::new(), None).await?;
        self.collect(response).await?;
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
        let mut response = self.send(Method::PUT, route, body.into(), None).await?;
        let mut pending = Vec::new();
        while let Some(frame) = response.frame().await {
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
        let response = self
            .request(Method::GET, "/console", Bytes::new(), Some(CONSOLE_PROTOCOL))
            .await?;
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(|source| self.http(source))?;
        Ok(TokioIo::new(upgraded))
    }

    async fn send(
        &self,
        method: Method,
        route: &str,
        body: Bytes,
        upgrade: Option<&str>,
    ) -> Result<Incoming, ClientError> {
        Ok(self.request(method, route, body, upgrade).await?.into_body())
    }

    async fn request(
        &self,
        method: Method,
        route: &str,
        body: Bytes,
        upgrade: Option<&str>,
    ) -> Result<Response<Incoming>, ClientError> {
        let connect = |source| ClientError::Connect {
            path: self.path.clone(),
            source,
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
