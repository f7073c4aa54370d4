//! Names of hosts: looked up here, by the command that was given one, and nowhere else in the program.

use std::fmt;
use std::net::ToSocketAddrs;
use std::str::FromStr;

use anyhow::Context;
use migration::{Endpoint, EndpointError};

/// An endpoint as users write it: `tcp:HOST:PORT`, where HOST may be a name, or whatever [`Endpoint`] takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Named { host: String, port: u16 },
    Endpoint(Endpoint),
}

impl Place {
    /// All addresses of a name, in the system's order, or the absolute path of a socket. To look up a name may hang, or
    /// crash in one of the host's NSS modules, which a static program loads: this process has no guest yet, or never
    /// will.
    pub(crate) fn resolve(&self) -> anyhow::Result<Endpoint> {
        match self {
            Place::Named { host, port } => {
                let found = (host.as_str(), *port).to_socket_addrs();
                let found = found.with_context(|| format!("cannot find the host of {self}"))?;
                Ok(Endpoint::Tcp(found.collect()))
            }
            // This command's directory is not that of the process that connects.
            Place::Endpoint(Endpoint::Unix(path)) => {
                let path = std::path::absolute(path).with_context(|| format!("{self}"))?;
                Ok(Endpoint::Unix(path))
            }
            Place::Endpoint(endpoint) => Ok(endpoint.clone()),
        }
    }
}

impl FromStr for Place {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        match text.parse() {
            Ok(endpoint) => Ok(Place::Endpoint(endpoint)),
            Err(EndpointError::Name { host, port, .. }) if !text.contains(',') => {
                Ok(Place::Named { host, port })
            }
            Err(error) => Err(error),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Named { host, port } => write!(f, "tcp:{host}:{port}"),
            Place::Endpoint(endpoint) => endpoint.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn a_name_stands_for_all_its_addresses() {
        let place: Place = "tcp:localhost:7000".parse().unwrap();
        assert_eq!(place.to_string(), "tcp:localhost:7000");
        let Endpoint::Tcp(addresses) = place.resolve().unwrap() else {
            panic!("TCP only")
        };
        assert!(
            addresses
                .iter()
                .all(|address| address.ip().is_loopback() && address.port() == 7000)
        );
        assert!(addresses.contains(&([127, 0, 0, 1], 7000).into()));
        // Addresses are not looked up.
        for text in ["tcp:192.0.2.1:7000,[2001:db8::1]:7000", "unix:/run/x"] {
            let place: Place = text.parse().unwrap();
            assert_eq!(place.resolve().unwrap().to_string(), text);
        }
        let here = std::env::current_dir().unwrap().join("x");
        let place: Place = "unix:x".parse().unwrap();
        assert_eq!(place.resolve().unwrap(), Endpoint::Unix(here));
        let nobody: Place = "tcp:no-such-host.invalid:7000".parse().unwrap();
        let error = nobody.resolve().unwrap_err().to_string();
        assert_eq!(error, "cannot find the host of tcp:no-such-host.invalid:7000");
        assert!("tcp:10.0.0.1:7000,host-b:7000".parse::<Place>().is_err());
    }

    /// Looks for what looks up names in every source file but this one; tests at the end of a file are left out.
    fn find_lookups(dir: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "tests" && name != "target" {
                    find_lookups(&path, found);
                }
            } else if name.ends_with(".rs") && name != "tests.rs" && !path.ends_with("args/place.rs") {
                let text = fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
                let resolvers = [
                    "ToSocketAddrs",
                    "to_socket_addrs",
                    "lookup_host",
                    "getaddrinfo",
                    // These do it unasked.
                    "TcpStream::connect",
                    "TcpListener::bind",
                    "UdpSocket::bind",
                ];
                found.extend(
                    resolvers
                        .iter()
                        .filter(|word| code.contains(*word))
                        .map(|word| format!("{}: {word}", path.display())),
                );
            }
        }
    }

    #[test]
    fn nothing_else_looks_up_names() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let mut found = Vec::new();
        for dir in ["vmm", "migration", "devices"] {
            find_lookups(&root.join(dir), &mut found);
        }
        assert!(found.is_empty(), "{found:#?}");
    }
}
