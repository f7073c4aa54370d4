//! One request: parsed from a descriptor chain, carried out on a backend.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::GuestAddress;

use super::backend::BlockBackend;
use super::error::BlockRequestError;
use super::io::BlockIo;
use super::parameters::CacheMode;
use super::{ID_LEN, REQUEST_HEADER_LEN, SECTOR_SIZE};
use crate::GuestMemory;
use crate::virtio::sys::Durability;
use crate::virtio::{Buffers, Chain, Served};

/// Sector, number of sectors, flags: what a driver wants discarded or zeroed (virtio 1.2, 5.2.6).
const SEGMENT_LEN: usize = 16;
/// The flag of a segment whose space may be given up.
const UNMAP: u32 = 1 << 0;
/// Most bytes that one request transfers. A driver that keeps to SIZE_MAX and SEG_MAX stays below.
pub(super) const MAX_TRANSFERRED: u64 = 16 << 20;
/// Most sectors that one request discards.
pub(super) const MAX_DISCARDED: u32 = 1 << 22;
/// Most sectors that one request zeroes: where the host cannot, they are written.
pub(super) const MAX_ZEROED: u32 = 1 << 16;

/// A request and where its outcome goes.
#[derive(Debug)]
pub(super) struct BlockRequest {
    /// GPA of the status byte.
    pub(super) status: GuestAddress,
    /// The type, `VIRTIO_BLK_T_…`, or any number of the guest's.
    pub(super) kind: u32,
    sector: u64,
    /// Data from the driver, without the header.
    readable: Buffers,
    /// Buffers for data to the driver, without the status byte.
    writable: Buffers,
}

/// The status byte of a request that was done.
pub(super) const OK: u8 = VIRTIO_BLK_S_OK as u8;

/// The disk on which a request is carried out.
pub(super) struct RequestTarget<'a> {
    pub(super) backend: &'a BlockBackend,
    pub(super) id: &'a [u8; ID_LEN],
    pub(super) cache: CacheMode,
    /// What a write must have reached when the guest gets the answer.
    pub(super) durability: Durability,
}

/// What a request needs after its first step.
#[derive(Debug)]
pub(super) enum RequestStep {
    /// Nothing: it is done.
    Done(Served),
    /// This I/O.
    Transfer(BlockIo),
}

impl BlockRequest {
    /// Finds the parts of a request in a chain, however the driver split them (virtio 1.2, 5.2.6 and
    /// 2.7.4.1: the framing is the driver's choice). The error comes with the status byte's address if that
    /// much was found.
    pub(super) fn parse(
        memory: &GuestMemory,
        chain: Chain,
    ) -> Result<Self, (Option<GuestAddress>, BlockRequestError)> {
        let Chain {
            mut readable,
            mut writable,
        } = chain;
        let Some(status) = writable.take_last_byte() else {
            return Err((None, BlockRequestError::NoStatus));
        };
        let mut header = [0; REQUEST_HEADER_LEN];
        match readable.read(memory, &mut header) {
            Ok(REQUEST_HEADER_LEN) => {}
            Ok(got) => return Err((Some(status), BlockRequestError::Header { got })),
            Err(error) => return Err((Some(status), error.into())),
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        Ok(Self {
            status,
            kind,
            sector: u64::from_le_bytes(sector),
            readable,
            writable,
        })
    }

    /// Bytes of the request's data.
    pub(super) fn len(&self) -> u64 {
        self.readable.len() + self.writable.len()
    }

    /// Carries the request out, or returns the I/O that it needs. The bytes written do not count the status byte.
    pub(super) fn execute(
        self,
        memory: &GuestMemory,
        disk: &RequestTarget<'_>,
    ) -> Result<RequestStep, BlockRequestError> {
        match self.kind {
            VIRTIO_BLK_T_IN => self.read(disk.backend).map(RequestStep::Transfer),
            VIRTIO_BLK_T_OUT => self.write(disk).map(RequestStep::Transfer),
            // The writes need to survive this process, and not the host.
            VIRTIO_BLK_T_FLUSH if disk.cache == CacheMode::Unsafe => {
                Ok(RequestStep::Transfer(BlockIo::WriteOut))
            }
            VIRTIO_BLK_T_FLUSH => Ok(RequestStep::Transfer(BlockIo::Flush)),
            VIRTIO_BLK_T_DISCARD => self.discard(memory, disk).map(RequestStep::Transfer),
            VIRTIO_BLK_T_WRITE_ZEROES => self.write_zeroes(memory, disk).map(RequestStep::Transfer),
            VIRTIO_BLK_T_GET_ID => Ok(RequestStep::Done(self.identify(memory, disk.id)?.into())),
            other => Err(BlockRequestError::Unsupported(other)),
        }
    }

    fn read(self, backend: &BlockBackend) -> Result<BlockIo, BlockRequestError> {
        if !self.readable.is_empty() {
            return Err(BlockRequestError::Direction);
        }
        Ok(BlockIo::Read {
            offset: check_transfer(self.sector, self.writable.len(), backend)?,
            into: self.writable,
        })
    }

    fn write(self, disk: &RequestTarget<'_>) -> Result<BlockIo, BlockRequestError> {
        if !self.writable.is_empty() {
            return Err(BlockRequestError::Direction);
        }
        if disk.backend.read_only() {
            return Err(BlockRequestError::ReadOnly);
        }
        Ok(BlockIo::Write {
            offset: check_transfer(self.sector, self.readable.len(), disk.backend)?,
            from: self.readable,
            durability: disk.durability,
        })
    }

    fn discard(self, memory: &GuestMemory, disk: &RequestTarget<'_>) -> Result<BlockIo, BlockRequestError> {
        let segment = self.segment(memory, disk.backend, MAX_DISCARDED)?;
        if segment.flags != 0 {
            return Err(BlockRequestError::Flags { got: segment.flags });
        }
        Ok(BlockIo::Discard {
            offset: segment.offset,
            len: segment.len,
            durability: disk.durability,
        })
    }

    fn write_zeroes(
        self,
        memory: &GuestMemory,
        disk: &RequestTarget<'_>,
    ) -> Result<BlockIo, BlockRequestError> {
        let segment = self.segment(memory, disk.backend, MAX_ZEROED)?;
        if segment.flags & !UNMAP != 0 {
            return Err(BlockRequestError::Flags { got: segment.flags });
        }
        Ok(BlockIo::Zero {
            offset: segment.offset,
            len: segment.len,
            unmap: segment.flags & UNMAP != 0,
            durability: disk.durability,
        })
    }

    /// Parses and checks the one range that the request is about.
    fn segment(
        mut self,
        memory: &GuestMemory,
        backend: &BlockBackend,
        most: u32,
    ) -> Result<Segment, BlockRequestError> {
        if !self.writable.is_empty() {
            return Err(BlockRequestError::Direction);
        }
        if backend.read_only() {
            return Err(BlockRequestError::ReadOnly);
        }
        let (len, mut bytes) = (self.readable.len(), [0; SEGMENT_LEN]);
        self.readable.read(memory, &mut bytes)?;
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        if len != SEGMENT_LEN as u64 || sectors > most {
            return Err(BlockRequestError::Segment { most, len, sectors });
        }
        let len = u64::from(sectors) * SECTOR_SIZE;
        Ok(Segment {
            offset: check_range(u64::from_le_bytes(sector), len, backend)?,
            len,
            flags: u32::from_le_bytes([f0, f1, f2, f3]),
        })
    }

    /// Answers GET_ID. Returns the bytes written.
    fn identify(mut self, memory: &GuestMemory, id: &[u8; ID_LEN]) -> Result<u32, BlockRequestError> {
        if !self.readable.is_empty() {
            return Err(BlockRequestError::Direction);
        }
        // At most `ID_LEN`.
        Ok(self.writable.fill(memory, id)? as u32)
    }
}

/// A range of the disk in bytes.
struct Segment {
    offset: u64,
    len: u64,
    flags: u32,
}

/// As [`check_range`], for a request that transfers data: it may be at most [`MAX_TRANSFERRED`] bytes long.
fn check_transfer(sector: u64, len: u64, backend: &BlockBackend) -> Result<u64, BlockRequestError> {
    if len > MAX_TRANSFERRED {
        return Err(BlockRequestError::TooLong {
            most: MAX_TRANSFERRED,
            len,
        });
    }
    check_range(sector, len, backend)
}

/// The byte offset of `len` bytes from `sector` on, all of which are on the disk.
fn check_range(sector: u64, len: u64, backend: &BlockBackend) -> Result<u64, BlockRequestError> {
    let capacity = backend.sectors();
    if !len.is_multiple_of(SECTOR_SIZE) {
        return Err(BlockRequestError::PartialSector { len });
    }
    let (block, sectors) = (backend.block_size(), len / SECTOR_SIZE);
    if !(sector | sectors).is_multiple_of(u64::from(block) / SECTOR_SIZE) {
        return Err(BlockRequestError::PartialBlock { block, sector, len });
    }
    match sector.checked_add(sectors) {
        Some(end) if end <= capacity => Ok(sector * SECTOR_SIZE),
        _ => Err(BlockRequestError::OutOfRange {
            capacity,
            sector,
            len,
        }),
    }
}
