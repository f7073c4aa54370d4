//! What a device is made with, and how a destination is told.

use crate::rate::Limits;

/// The smallest address that a guest can have: those below mean something else.
pub const CID_MIN: u32 = 3;
/// The largest; the one above means "any".
pub const CID_MAX: u32 = u32::MAX - 1;

/// What a device is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VsockParameters {
    /// The guest's address, [`CID_MIN`] to [`CID_MAX`].
    pub guest_cid: u32,
    /// What goes in each direction in a time; an operation is a packet, the bytes are those of its data.
    pub limits: Limits,
}

impl VsockParameters {
    /// As they travel: the address in little-endian order, then the limits.
    pub fn to_bytes(self) -> Vec<u8> {
        [&self.guest_cid.to_le_bytes()[..], &self.limits.to_bytes()].concat()
    }

    /// From a peer, untrusted; `None` if they make no sense.
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
    fn what_is_told_is_understood() {
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
