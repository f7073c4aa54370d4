//! What a socket device is made with, and its form for a destination.

use crate::rate::Limits;

/// The smallest CID that a guest can have: those below are reserved.
pub const CID_MIN: u32 = 3;
/// The largest CID of a guest; the one above means "any".
pub const CID_MAX: u32 = u32::MAX - 1;

/// What a socket device is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VsockParameters {
    /// The guest's address, [`CID_MIN`] to [`CID_MAX`].
    pub guest_cid: u32,
    /// Rate limits of each direction: an operation is a packet, the bytes are those of its data.
    pub limits: Limits,
}

impl VsockParameters {
    /// As sent to a destination: the address in little-endian order, then the limits.
    pub fn to_bytes(self) -> Vec<u8> {
        [&self.guest_cid.to_le_bytes()[..], &self.limits.to_bytes()].concat()
    }

    /// Parses what [`VsockParameters::to_bytes`] made. The bytes come from a peer and are untrusted; `None` if they are
    /// not valid.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (cid, limits) = bytes.split_first_chunk()?;
        let parameters = Self {
            guest_cid: u32::from_le_bytes(*cid),
            limits: Limits::from_bytes(limits)?,
        };
        (CID_MIN..=CID_MAX)
            .contains(&parameters.guest_cid)
            .then_some(parameters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::Bucket;

    #[test]
    fn parameters_as_bytes() {
        let limits = Limits {
            bandwidth: Some(Bucket::per_second(1 << 20)),
            operations: None,
        };
        for limits in [limits, Limits::default()] {
            let parameters = VsockParameters { guest_cid: 3, limits };
            assert_eq!(
                VsockParameters::from_bytes(&parameters.to_bytes()),
                Some(parameters)
            );
        }
        for bad in [&[][..], &[3, 0, 0], &[2, 0, 0, 0], &[0xff; 4], &[3, 0, 0, 0, 0]] {
            assert_eq!(VsockParameters::from_bytes(bad), None, "{bad:?}");
        }
    }
}
