//! What a network device is made with, and what a destination must know to make its like.

use super::mac::{MacAddress, MacError};
use crate::rate::Limits;

/// Smallest MTU that a device may have (virtio 1.2, 5.1.4.1), in bytes.
const MTU_MIN: u16 = 68;
/// Most pairs of queues of a device: one thread serves them all.
pub const MAX_QUEUE_PAIRS: u16 = 16;

/// What the guest sees of its network device that does not come from its tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetParameters {
    /// Its address.
    pub mac: MacAddress,
    /// Largest packet, without Ethernet's header, in bytes.
    pub mtu: u16,
    /// Pairs of queues, one to receive and one to send each: 1 to [`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u16,
    /// What the guest may receive in a time.
    pub rx_limits: Limits,
    /// What it may send.
    pub tx_limits: Limits,
}

/// Why bytes are not the parameters of a network device.
#[derive(Debug, thiserror::Error)]
pub enum NetParametersError {
    /// Too few or too many bytes.
    #[error(
        "parameters: expected {} bytes and rate limits, got {got} bytes",
        NetParameters::FIXED_LEN
    )]
    Length {
        /// How many there are.
        got: usize,
    },
    /// No valid address.
    #[error(transparent)]
    Mac(#[from] MacError),
    /// An MTU that is too small.
    #[error("MTU: expected at least {MTU_MIN}, got {got}")]
    Mtu {
        /// What the bytes say.
        got: u16,
    },
    /// More pairs of queues than any device has, or none.
    #[error("queues: expected 1 to {MAX_QUEUE_PAIRS} pairs, got {got}")]
    QueuePairs {
        /// What the bytes say.
        got: u16,
    },
}

impl NetParameters {
    /// Bytes before the limits.
    const FIXED_LEN: usize = 11;

    /// As sent to a destination, numbers in little-endian order: address, MTU, pairs of queues, the length of the
    /// receive limits in bytes, the receive limits, the transmit limits.
    pub fn to_bytes(self) -> Vec<u8> {
        let rx_limits = self.rx_limits.to_bytes();
        [
            &self.mac.bytes()[..],
            &self.mtu.to_le_bytes(),
            &self.queue_pairs.to_le_bytes(),
            // None or 48.
            &[rx_limits.len() as u8],
            &rx_limits,
            &self.tx_limits.to_bytes(),
        ]
        .concat()
    }

    /// Parses what [`NetParameters::to_bytes`] made. The bytes come from a peer and are untrusted.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NetParametersError> {
        let length = || NetParametersError::Length { got: bytes.len() };
        let (fixed, limits) = bytes.split_first_chunk().ok_or_else(length)?;
        let [a, b, c, d, e, f, mtu @ .., q0, q1, rx_len]: [u8; Self::FIXED_LEN] = *fixed;
        let (rx, tx) = limits.split_at_checked(rx_len.into()).ok_or_else(length)?;
        Self {
            mac: [a, b, c, d, e, f].try_into()?,
            mtu: u16::from_le_bytes(mtu),
            queue_pairs: u16::from_le_bytes([q0, q1]),
            rx_limits: Limits::from_bytes(rx).ok_or_else(length)?,
            tx_limits: Limits::from_bytes(tx).ok_or_else(length)?,
        }
        .checked()
    }

    fn checked(self) -> Result<Self, NetParametersError> {
        if self.mtu < MTU_MIN {
            return Err(NetParametersError::Mtu { got: self.mtu });
        }
        if !(1..=MAX_QUEUE_PAIRS).contains(&self.queue_pairs) {
            return Err(NetParametersError::QueuePairs {
                got: self.queue_pairs,
            });
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::Bucket;

    #[test]
    fn what_travels_is_checked() {
        let plain = NetParameters {
            mac: "02:00:00:00:00:01".parse().unwrap(),
            mtu: 1500,
            queue_pairs: 2,
            rx_limits: Limits::default(),
            tx_limits: Limits::default(),
        };
        let bytes = plain.to_bytes();
        assert_eq!(bytes, [2, 0, 0, 0, 0, 1, 0xdc, 5, 2, 0, 0]);
        assert_eq!(NetParameters::from_bytes(&bytes).unwrap(), plain);
        let limits = Limits {
            bandwidth: Some(Bucket::per_second(7)),
            operations: None,
        };
        for limited in [
            NetParameters {
                rx_limits: limits,
                ..plain
            },
            NetParameters {
                tx_limits: limits,
                ..plain
            },
            NetParameters {
                rx_limits: limits,
                tx_limits: limits,
                ..plain
            },
        ] {
            let bytes = limited.to_bytes();
            assert_eq!(NetParameters::from_bytes(&bytes).unwrap(), limited);
            assert!(NetParameters::from_bytes(&bytes[..bytes.len() - 1]).is_err());
        }
        for bad in [
            &bytes[..10],
            &[0; 12],
            &[1, 0, 0, 0, 0, 1, 0xdc, 5, 2, 0, 0],
            &[2, 0, 0, 0, 0, 1, 67, 0, 2, 0, 0],
            &[2, 0, 0, 0, 0, 1, 0xdc, 5, 0, 0, 0],
            &[2, 0, 0, 0, 0, 1, 0xdc, 5, 17, 0, 0],
            &[2, 0, 0, 0, 0, 1, 0xdc, 5, 2, 0, 1],
        ] {
            assert!(NetParameters::from_bytes(bad).is_err(), "{bad:?}");
        }
    }
}
