//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

/// The address of one network card, `02:00:00:00:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MacAddress([u8; 6]);

/// Not the address of one network card.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("MAC address: expected one of a single card, like 02:00:00:00:00:01, got {got:?}")]
pub struct MacError {
    got: String,
}

/// Addresses with this bit stand for a group of cards.
const GROUP: u8 = 1;
/// Addresses with this bit are given out locally, not by a card's maker.
const LOCAL: u8 = 2;

impl MacAddress {
    /// An address that no other card is likely to have: 46 random bits, marked as given locally.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 6];
        // So few bytes always come in one go.
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        bytes[0] = bytes[0] & !GROUP | LOCAL;
        Ok(Self(bytes))
    }

    /// Its bytes, in the order in which they are sent.
    pub fn bytes(&self) -> [u8; 6] {
        self.0
    }
}

impl TryFrom<[u8; 6]> for MacAddress {
    type Error = MacError;

    fn try_from(bytes: [u8; 6]) -> Result<Self, MacError> {
        let address = Self(bytes);
        if bytes == [0; 6] || bytes[0] & GROUP != 0 {
            let got = address.to_string();
            return Err(MacError { got });
        }
        Ok(address)
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let nonsense = || MacError { got: text.into() };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit()))
                .ok_or_else(nonsense)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| nonsense())?;
        }
        match parts.next() {
            None => Self::try_from(bytes),
            Some(_) => Err(nonsense()),
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes() {
        let address: MacAddress = "02:fc:00:00:0A:01".parse().unwrap();
        assert_eq!(address.bytes(), [2, 0xfc, 0, 0, 10, 1]);
        assert_eq!(address.to_string(), "02:fc:00:00:0a:01");
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "02:00:00:00:00:+1",
            "2:0:0:0:0:1",
            "00:00:00:00:00:00",
            "03:00:00:00:00:01",
            "ff:ff:ff:ff:ff:ff",
        ] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn random_addresses_are_local_and_differ() {
        let (one, other) = (MacAddress::random().unwrap(), MacAddress::random().unwrap());
        assert_eq!(one.bytes()[0] & (GROUP | LOCAL), LOCAL);
        assert_ne!(one, other);
    }
}
