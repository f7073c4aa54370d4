//! Packets as they are in the queues (virtio 1.2, 5.10.6).

/// Bytes of a header.
pub(super) const HEADER_LEN: usize = 44;
/// The host's address.
pub(super) const HOST_CID: u64 = 2;
/// No port: a program that binds to it gets any free port.
pub(super) const PORT_ANY: u32 = u32::MAX;
/// Stream sockets.
pub(super) const TYPE_STREAM: u16 = 1;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum PacketOp {
    /// Asks for a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// Refuses or ends one.
    Reset = 3,
    /// The sender will no longer do what the flags name: [`NO_RECEIVE`], [`NO_SEND`].
    Shutdown = 4,
    /// Carries data.
    Data = 5,
    /// Carries the sender's room for data.
    CreditUpdate = 6,
    /// Asks for the receiver's room for data.
    CreditRequest = 7,
}

/// Flag of a shutdown: the sender takes no more data.
pub(super) const NO_RECEIVE: u32 = 1;
/// Flag of a shutdown: the sender sends no more data.
pub(super) const NO_SEND: u32 = 2;
/// Both.
pub(super) const NOTHING_MORE: u32 = NO_RECEIVE | NO_SEND;

impl PacketOp {
    fn decode(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// The ports of a connection, by which the device knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PortPair {
    /// The host's.
    pub(super) host: u32,
    /// The guest's.
    pub(super) guest: u32,
}

/// The header of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct VsockHeader {
    pub(super) source_cid: u64,
    pub(super) destination_cid: u64,
    pub(super) source_port: u32,
    pub(super) destination_port: u32,
    /// Bytes of data that follow.
    pub(super) len: u32,
    /// The socket's type.
    pub(super) kind: u16,
    /// `None` for an operation that the specification does not define.
    pub(super) op: Option<PacketOp>,
    pub(super) flags: u32,
    /// The sender's room for data, in bytes, full or free.
    pub(super) buffer_size: u32,
    /// Bytes that have left the sender's room in total; wraps.
    pub(super) forwarded: u32,
}

impl VsockHeader {
    /// Parses a header.
    pub(super) fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let rest = &mut &bytes[..];
        Self {
            source_cid: u64::from_le_bytes(take(rest)),
            destination_cid: u64::from_le_bytes(take(rest)),
            source_port: u32::from_le_bytes(take(rest)),
            destination_port: u32::from_le_bytes(take(rest)),
            len: u32::from_le_bytes(take(rest)),
            kind: u16::from_le_bytes(take(rest)),
            op: PacketOp::decode(u16::from_le_bytes(take(rest))),
            flags: u32::from_le_bytes(take(rest)),
            buffer_size: u32::from_le_bytes(take(rest)),
            forwarded: u32::from_le_bytes(take(rest)),
        }
    }

    /// Its bytes.
    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.map_or(0, |op| op as u16).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer_size.to_le_bytes());
        bytes[40..].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet.
    pub(super) fn refusal(&self) -> Self {
        Self {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            len: 0,
            kind: self.kind,
            op: Some(PacketOp::Reset),
            flags: 0,
            buffer_size: 0,
            forwarded: 0,
        }
    }
}

/// Takes the first bytes off; zeroes where there are not enough.
fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    match bytes.split_first_chunk() {
        Some((first, rest)) => {
            *bytes = rest;
            *first
        }
        None => [0; N],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_its_place() {
        let bytes: [u8; HEADER_LEN] = std::array::from_fn(|at| {
            if at == 30 {
                5
            } else if at == 31 {
                0
            } else {
                at as u8
            }
        });
        let header = VsockHeader::decode(&bytes);
        assert_eq!(header.source_cid, 0x0706_0504_0302_0100);
        assert_eq!((header.source_port, header.len), (0x1312_1110, 0x1b1a_1918));
        assert_eq!((header.kind, header.op), (0x1d1c, Some(PacketOp::Data)));
        assert_eq!((header.flags, header.forwarded), (0x2322_2120, 0x2b2a_2928));
        assert_eq!(header.encode(), bytes);
    }

    #[test]
    fn a_refusal_goes_back_to_where_the_packet_came_from() {
        let header = VsockHeader::decode(&std::array::from_fn(|at| at as u8));
        assert_eq!(header.op, None);
        let refusal = header.refusal();
        assert_eq!(refusal.destination_port, header.source_port);
        assert_eq!(
            (refusal.op, refusal.refusal().source_cid),
            (Some(PacketOp::Reset), header.source_cid)
        );
    }
}
