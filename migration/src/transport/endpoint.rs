use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where a destination listens: `tcp:HOST:PORT` (an IPv6 address in brackets) or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Endpoint {
    /// A TCP port.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port; 0 lets a listener choose.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// Why a text is not an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// Neither `tcp:` nor `unix:`.
    #[error("{text:?} is not an endpoint: expected tcp:HOST:PORT or unix:PATH")]
    Scheme {
        /// The whole text.
        text: String,
    },
    /// No host before the port, or no port after it.
    #[error("{text:?} is not an endpoint: expected tcp:HOST:PORT, {missing} is missing")]
    Missing {
        /// The whole text.
        text: String,
        /// `the host` or `the port`.
        missing: &'static str,
    },
    /// The port is not a number from 0 to 65535.
    #[error("{text:?} is not an endpoint: expected a port from 0 to 65535, got {port:?}")]
    Port {
        /// The whole text.
        text: String,
        /// What is in the port's place.
        port: String,
    },
    /// An IPv6 address without brackets, or with one only.
    #[error("{text:?} is not an endpoint: expected an IPv6 address in brackets, as in tcp:[::1]:9000")]
    Brackets {
        /// The whole text.
        text: String,
    },
    /// A socket's path is empty or longer than the system takes.
    #[error("{text:?} is not an endpoint: expected unix:PATH with a path of 1 to 107 bytes, got {len}")]
    Path {
        /// The whole text.
        text: String,
        /// Bytes of the path.
        len: usize,
    },
}

/// Longest path of a Unix socket, the final zero excluded (`sockaddr_un`).
const MAX_PATH_LEN: usize = 107;

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        match text.split_once(':') {
            Some(("tcp", address)) => tcp(text, address),
            Some(("unix", path)) => match path.len() {
                1..=MAX_PATH_LEN => Ok(Endpoint::Unix(PathBuf::from(path))),
                len => Err(EndpointError::Path {
                    text: text.into(),
                    len,
                }),
            },
            _ => Err(EndpointError::Scheme { text: text.into() }),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Endpoint::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl TryFrom<String> for Endpoint {
    type Error = EndpointError;

    fn try_from(text: String) -> Result<Self, EndpointError> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> String {
        endpoint.to_string()
    }
}

fn tcp(text: &str, address: &str) -> Result<Endpoint, EndpointError> {
    let missing = |missing| EndpointError::Missing {
        text: text.into(),
        missing,
    };
    let brackets = || EndpointError::Brackets { text: text.into() };
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or_else(brackets)?;
            (host, rest.strip_prefix(':').ok_or_else(|| missing("the port"))?)
        }
        None => {
            let (host, port) = address.rsplit_once(':').ok_or_else(|| missing("the port"))?;
            if host.contains([':', ']']) {
                return Err(brackets());
            }
            (host, port)
        }
    };
    if host.is_empty() {
        return Err(missing("the host"));
    }
    if port.is_empty() {
        return Err(missing("the port"));
    }
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    match port.parse() {
        Ok(port) if digits => Ok(Endpoint::Tcp {
            host: host.into(),
            port,
        }),
        _ => Err(EndpointError::Port {
            text: text.into(),
            port: port.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_and_written_alike() {
        for text in [
            "tcp:10.0.0.1:9000",
            "tcp:[::1]:9000",
            "tcp:host-b:0",
            "unix:/run/a:b",
            "unix:x",
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        assert_eq!(
            "tcp:[::1]:9000".parse(),
            Ok(Endpoint::Tcp {
                host: "::1".into(),
                port: 9000
            })
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |text: &str| text.parse::<Endpoint>().unwrap_err();
        assert!(matches!(error("10.0.0.1:9000"), EndpointError::Scheme { .. }));
        assert!(matches!(error("udp:10.0.0.1:9000"), EndpointError::Scheme { .. }));
        assert!(matches!(
            error("tcp:10.0.0.1"),
            EndpointError::Missing {
                missing: "the port",
                ..
            }
        ));
        assert!(matches!(
            error("tcp:10.0.0.1:"),
            EndpointError::Missing {
                missing: "the port",
                ..
            }
        ));
        assert!(matches!(
            error("tcp::9000"),
            EndpointError::Missing {
                missing: "the host",
                ..
            }
        ));
        assert!(matches!(
            error("tcp:[]:9000"),
            EndpointError::Missing {
                missing: "the host",
                ..
            }
        ));
        assert!(matches!(
            error("tcp:[::1]9000"),
            EndpointError::Missing {
                missing: "the port",
                ..
            }
        ));
        assert!(matches!(error("tcp:::1:9000"), EndpointError::Brackets { .. }));
        assert!(matches!(error("tcp:[::1:9000"), EndpointError::Brackets { .. }));
        for port in ["65536", "-1", "+1", "http"] {
            assert!(
                matches!(error(&format!("tcp:a:{port}")), EndpointError::Port { .. }),
                "{port}"
            );
        }
        assert!(matches!(error("unix:"), EndpointError::Path { len: 0, .. }));
        assert!(matches!(
            error(&format!("unix:{}", "x".repeat(108))),
            EndpointError::Path { len: 108, .. }
        ));
    }
}
