//! What a network device is made with, and what a destination must know to make its like.

use super::mac::{MacAddress, MacError};

/// Smallest MTU that a device may have (virtio 1.2, 5.1.4.1), in bytes.
const MTU_MIN: u16 = 68;

/// What the guest sees of its network device that does not come from its tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Its address.
    pub mac: MacAddress,
    /// Largest packet, without Ethernet's header, in bytes.
    pub mtu: u16,
}

/// Bytes that are nobody's parameters.
#[derive(Debug, thiserror::Error)]
pub enum ParametersError {
    /// Too few or too many.
    #[error("parameters: expected {expected} bytes, got {got}")]
    Length {
        /// How many there must be.
        expected: usize,
        /// How many there are.
        got: usize,
    },
    /// No address.
    #[error(transparent)]
    Mac(#[from] MacError),
    /// No MTU.
    #[error("MTU: expected at least {MTU_MIN}, got {got}")]
    Mtu {
        /// What it says.
        got: u16,
    },
}

impl Parameters {
    const LEN: usize = 8;

    /// As they travel: the address, then the MTU in little-endian order.
    pub fn to_bytes(self) -> Vec<u8> {
        [&self.mac.bytes()[..], &self.mtu.to_le_bytes()].concat()
    }

    /// From a peer. Untrusted.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ParametersError> {
        let [a, b, c, d, e, f, low, high] =
            <[u8; Self::LEN]>::try_from(bytes).map_err(|_| ParametersError::Length {
                expected: Self::LEN,
                got: bytes.len(),
            })?;
        Self {
            mac: [a, b, c, d, e, f].try_into()?,
            mtu: u16::from_le_bytes([low, high]),
        }
        .checked()
    }

    fn checked(self) -> Result<Self, ParametersError> {
        if self.mtu < MTU_MIN {
            return Err(ParametersError::Mtu { got: self.mtu });
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_travels_is_checked() {
        let parameters = Parameters {
            mac: "02:00:00:00:00:01".parse().unwrap(),
            mtu: 1500,
        };
        let bytes = parameters.to_bytes();
        assert_eq!(bytes, [2, 0, 0, 0, 0, 1, 0xdc, 5]);
        assert_eq!(Parameters::from_bytes(&bytes).unwrap(), parameters);
        for bad in [
            &bytes[..7],
            &[0; 9],
            &[1, 0, 0, 0, 0, 1, 0xdc, 5],
            &[2, 0, 0, 0, 0, 1, 67, 0],
        ] {
            assert!(Parameters::from_bytes(bad).is_err(), "{bad:?}");
        }
    }
}
