//! Connections between two monitors: TCP or a Unix socket behind one type.

mod connection;
mod endpoint;
mod listener;

pub(crate) use connection::Connection;
pub use endpoint::{Endpoint, EndpointError};
pub(crate) use listener::Listener;

use std::io;
use std::time::Duration;

use named_socket::NamedListenerError;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// No receiver answers at the endpoint.
    #[error("cannot connect to {endpoint}")]
    Connect {
        /// Where to.
        endpoint: Endpoint,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// No receiver answers at the endpoint in time.
    #[error("cannot connect to {endpoint}: no answer within {} ms", after.as_millis())]
    ConnectTimedOut {
        /// Where to.
        endpoint: Endpoint,
        /// How long it was tried.
        after: Duration,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {endpoint}")]
    Listen {
        /// Where.
        endpoint: Endpoint,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The Unix socket cannot be listened on.
    #[error("cannot listen")]
    Named(#[from] NamedListenerError),
    /// The listener or the new connection failed.
    #[error("cannot accept a connection on {endpoint}")]
    Accept {
        /// Where.
        endpoint: Endpoint,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The system refused to wait.
    #[error("cannot wait for connections")]
    Wait(#[source] io::Error),
    /// The wait was cancelled.
    #[error("cancelled")]
    Cancelled,
}
