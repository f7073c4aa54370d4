//! What a console device is made with, and its form for a destination.

use std::collections::BTreeSet;

/// Most ports with a name.
pub const PORTS_MAX: usize = 15;
/// Most bytes of a port's name.
pub const PORT_NAME_MAX: usize = 64;

/// Separates names, and is in none of them.
const SEPARATOR: char = ',';

/// What a console device is made with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleParameters {
    /// Whether input from the machine's terminal goes to port 0.
    pub has_terminal: bool,
    /// The names of the further ports.
    pub ports: Vec<String>,
}

/// Why parameters are not valid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConsoleParametersError {
    /// Too many ports.
    #[error("ports: expected at most {PORTS_MAX}, got {got}")]
    TooMany {
        /// How many.
        got: usize,
    },
    /// A name that no port can have.
    #[error("port name {got:?}: expected 1 to {PORT_NAME_MAX} letters, digits, '.', '_' or '-'")]
    Name {
        /// The name.
        got: String,
    },
    /// Two ports of one name.
    #[error("port name {0:?} is used twice")]
    Twice(String),
    /// Malformed bytes.
    #[error("parameters: expected 0 or 1 and names, got {0:02x?}")]
    Bytes(Vec<u8>),
}

impl ConsoleParameters {
    /// Checks number and names of the ports.
    pub fn check(&self) -> Result<(), ConsoleParametersError> {
        if self.ports.len() > PORTS_MAX {
            let got = self.ports.len();
            return Err(ConsoleParametersError::TooMany { got });
        }
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let mut seen = BTreeSet::new();
        for name in &self.ports {
            if !(1..=PORT_NAME_MAX).contains(&name.len()) || !name.bytes().all(allowed) {
                return Err(ConsoleParametersError::Name { got: name.clone() });
            }
            if !seen.insert(name) {
                return Err(ConsoleParametersError::Twice(name.clone()));
            }
        }
        Ok(())
    }

    /// As sent to a destination.
    pub fn to_bytes(&self) -> Vec<u8> {
        let names = self.ports.join(&SEPARATOR.to_string());
        [&[self.has_terminal.into()], names.as_bytes()].concat()
    }

    /// Parses the parameters in a device's [`crate::virtio::Description::parameters`], which are untrusted.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ConsoleParametersError> {
        let nonsense = || ConsoleParametersError::Bytes(bytes.iter().copied().take(PORT_NAME_MAX).collect());
        let (terminal, names) = bytes.split_first().ok_or_else(nonsense)?;
        let has_terminal = match terminal {
            0 => false,
            1 => true,
            _ => return Err(nonsense()),
        };
        let names = std::str::from_utf8(names).map_err(|_| nonsense())?;
        let ports = match names {
            "" => Vec::new(),
            names => names
                .split(SEPARATOR)
                .take(PORTS_MAX + 1)
                .map(str::to_owned)
                .collect(),
        };
        let parameters = Self { has_terminal, ports };
        parameters.check()?;
        Ok(parameters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(ports: &[&str]) -> ConsoleParameters {
        ConsoleParameters {
            has_terminal: true,
            ports: ports.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn parameters_as_bytes() {
        for parameters in [
            ConsoleParameters::default(),
            with(&[]),
            with(&["a"]),
            with(&["org.qemu.guest_agent.0", "b-2"]),
        ] {
            assert_eq!(
                ConsoleParameters::from_bytes(&parameters.to_bytes()),
                Ok(parameters)
            );
        }
        for bad in [
            &b""[..],
            b"\x02",
            b"\x01a b",
            b"\x01a,",
            b"\x01a,a",
            b"\x00\xff",
            b"a",
        ] {
            assert!(ConsoleParameters::from_bytes(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_and_their_number_are_bounded() {
        let longest = "x".repeat(PORT_NAME_MAX);
        with(&[&longest]).check().unwrap();
        let error = with(&[&format!("{longest}x")]).check().unwrap_err();
        assert!(matches!(error, ConsoleParametersError::Name { .. }), "{error}");
        let names: Vec<_> = (0..=PORTS_MAX).map(|number| format!("p{number}")).collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        with(&names[..PORTS_MAX]).check().unwrap();
        let error = with(&names).check().unwrap_err();
        assert_eq!(error, ConsoleParametersError::TooMany { got: PORTS_MAX + 1 });
        let error = ConsoleParameters::from_bytes(&with(&names).to_bytes()).unwrap_err();
        assert_eq!(error, ConsoleParametersError::TooMany { got: PORTS_MAX + 1 });
    }
}
