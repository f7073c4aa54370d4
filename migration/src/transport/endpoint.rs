//! Where a destination is: addresses, never names.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where a destination listens: `tcp:ADDRESS:PORT[,ADDRESS:PORT]...` (an IPv6 address in brackets) or `unix:PATH`.
///
/// It has no host names: a look-up of one may hang, or end its process, and so must not happen in a process that has a
/// guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Endpoint {
    /// TCP addresses of one host, at least one, in the order in which they are tried. Port 0 lets a listener choose.
    Tcp(Vec<SocketAddr>),
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
    /// A name in the place of an address.
    #[error(
        "{text:?} names a host: expected an IP address, as `godwit migrate` sends after it has looked the name up"
    )]
    Name {
        /// The whole text.
        text: String,
        /// The name.
        host: String,
        /// The port.
        port: u16,
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

/// The longest path of a Unix socket in bytes, the final zero excluded (`sockaddr_un`).
const MAX_PATH_LEN: usize = 107;

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        match text.split_once(':') {
            Some(("tcp", addresses)) => addresses
                .split(',')
                .map(|address| tcp(text, address))
                .collect::<Result<_, _>>()
                .map(Endpoint::Tcp),
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
            Endpoint::Tcp(addresses) => {
                for (index, address) in addresses.iter().enumerate() {
                    write!(f, "{}{address}", if index == 0 { "tcp:" } else { "," })?;
                }
                Ok(())
            }
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

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Endpoint::Tcp(vec![address])
    }
}

/// Parses one address, which is part of the endpoint `text`.
fn tcp(text: &str, address: &str) -> Result<SocketAddr, EndpointError> {
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
    let number = port.parse().ok().filter(|_| digits);
    let number = number.ok_or_else(|| EndpointError::Port {
        text: text.into(),
        port: port.into(),
    })?;
    // The second way also takes the scope of an IPv6 address.
    let parsed = host.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, number));
    parsed
        .or_else(|_| address.parse())
        .map_err(|_| EndpointError::Name {
            text: text.into(),
            host: host.into(),
            port: number,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_and_written_alike() {
        for text in [
            "tcp:10.0.0.1:9000",
            "tcp:[::1]:9000",
            "tcp:[fe80::1%2]:9000",
            "tcp:[2001:db8::1]:7000,10.0.0.1:7000",
            "unix:/run/a:b",
            "unix:x",
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        assert_eq!(
            "tcp:[::1]:9000,1.2.3.4:0".parse(),
            Ok(Endpoint::Tcp(vec![
                (std::net::Ipv6Addr::LOCALHOST, 9000).into(),
                ([1, 2, 3, 4], 0).into()
            ]))
        );
    }

    #[test]
    fn a_name_is_no_address() {
        for (text, host) in [
            ("tcp:host-b:7000", "host-b"),
            ("tcp:10.0.0.1:7000,host-b:7000", "host-b"),
            ("tcp:10.0.0:7000", "10.0.0"),
            ("tcp:[fe80::1%eth0]:7000", "fe80::1%eth0"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err();
            assert!(error.to_string().contains("expected an IP address"), "{error}");
            let EndpointError::Name {
                host: found, port, ..
            } = error
            else {
                panic!("{error:?}")
            };
            assert_eq!((&found[..], port), (host, 7000));
        }
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
