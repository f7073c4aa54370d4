//! One request: parsed from a descriptor chain, carried out on a backend.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{GuestAddress, GuestMemoryError};

use super::backend::{Backend, BackendError};
use super::engine::Io;
use super::parameters::Cache;
use super::{ID_LEN, SECTOR_SIZE};
use crate::GuestMemory;
use crate::virtio::sys::Durability;
use crate::virtio::{Buffers, Chain, Served};

/// Type, a reserved word, sector; each little-endian.
const HEADER_LEN: usize = 16;

/// Sector, number of sectors, flags: what a driver wants discarded or zeroed (virtio 1.2, 5.2.6).
const SEGMENT_LEN: usize = 16;
/// The flag of a segment whose sectors may give up their space.
const UNMAP: u32 = 1 << 0;
/// Most bytes that one request transfers. A driver that keeps to SIZE_MAX and SEG_MAX stays below.
pub(super) const MOST_TRANSFERRED: u64 = 16 << 20;
/// Most sectors that one request discards.
pub(super) const MOST_DISCARDED: u32 = 1 << 22;
/// Most sectors that one request zeroes: where the host cannot, they are written.
pub(super) const MOST_ZEROED: u32 = 1 << 16;

/// A request and where its outcome goes.
#[derive(Debug)]
pub(super) struct Request {
    /// GPA of the status byte.
    pub(super) status: GuestAddress,
    pub(super) kind: u32,
    sector: u64,
    /// What the driver provides and what it wants filled, without header and status byte.
    readable: Buffers,
    writable: Buffers,
}

/// Why a request is not done. `Unsupported` has a status of its own, all others are I/O errors to the guest.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error("expected a writable byte for the status, got none")]
    NoStatus,
    #[error("expected a header of {HEADER_LEN} bytes, got {got}")]
    Header { got: usize },
    #[error("request type {0} is not supported")]
    Unsupported(u32),
    #[error("expected buffers of one direction, got both")]
    Direction,
    #[error("expected whole sectors, got {len} bytes")]
    PartialSector { len: u64 },
    #[error("expected whole blocks of {block} bytes, got {len} bytes at sector {sector}")]
    PartialBlock { block: u32, sector: u64, len: u64 },
    #[error("expected at most {most} bytes of data, got {len}")]
    TooLong { most: u64, len: u64 },
    #[error("expected sectors below {capacity}, got {len} bytes at sector {sector}")]
    OutOfRange { capacity: u64, sector: u64, len: u64 },
    #[error("expected one range of at most {most} sectors, got {len} bytes of ranges, {sectors} sectors")]
    Segment { most: u32, len: u64, sectors: u32 },
    #[error("expected no flag {got:#x} in a range")]
    Flags { got: u32 },
    #[error("whoever was to do it panicked")]
    Panicked,
    #[error("an earlier flush, of which the guest did not hear, has failed")]
    Lost,
    #[error("write to a read-only disk")]
    ReadOnly,
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl RequestError {
    /// The status byte that tells the guest.
    pub(super) fn status(&self) -> u8 {
        match self {
            Self::Unsupported(_) | Self::Flags { .. } => VIRTIO_BLK_S_UNSUPP as u8,
            _ => VIRTIO_BLK_S_IOERR as u8,
        }
    }
}

/// The status byte of a request that was done.
pub(super) const OK: u8 = VIRTIO_BLK_S_OK as u8;

/// What a request is carried out on.
pub(super) struct Disk<'a> {
    pub(super) backend: &'a Backend,
    pub(super) id: &'a [u8; ID_LEN],
    pub(super) cache: Cache,
    /// What a write must be when the guest hears that it is done.
    pub(super) durability: Durability,
}

/// What came of looking at a request.
#[derive(Debug)]
pub(super) enum Step {
    Done(Served),
    Transfer(Io),
}

impl Request {
    /// Finds the parts of a request in a chain, however the driver split them (virtio 1.2, 5.2.6 and
    /// 2.7.4.1: the framing is the driver's choice). The error comes with the status byte's address if that
    /// much was found.
    pub(super) fn parse(
        memory: &GuestMemory,
        chain: Chain,
    ) -> Result<Self, (Option<GuestAddress>, RequestError)> {
        let Chain {
            mut readable,
            mut writable,
        } = chain;
        let Some(status) = writable.take_last_byte() else {
            return Err((None, RequestError::NoStatus));
        };
        let mut header = [0; HEADER_LEN];
        match readable.read(memory, &mut header) {
            Ok(HEADER_LEN) => {}
            Ok(got) => return Err((Some(status), RequestError::Header { got })),
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

    /// Bytes that the driver provides or wants.
    pub(super) fn len(&self) -> u64 {
        self.readable.len() + self.writable.len()
    }

    /// Carries the request out, or says what is to be transferred for it; what was written does not count the status
    /// byte.
    pub(super) fn execute(self, memory: &GuestMemory, disk: &Disk<'_>) -> Result<Step, RequestError> {
        match self.kind {
            VIRTIO_BLK_T_IN => self.read(disk.backend).map(Step::Transfer),
            VIRTIO_BLK_T_OUT => self.write(disk).map(Step::Transfer),
            // The host's end may take it away, but not this process's.
            VIRTIO_BLK_T_FLUSH if disk.cache == Cache::Unsafe => Ok(Step::Transfer(Io::WriteOut)),
            VIRTIO_BLK_T_FLUSH => Ok(Step::Transfer(Io::Flush)),
            VIRTIO_BLK_T_DISCARD => self.discard(memory, disk).map(Step::Transfer),
            VIRTIO_BLK_T_WRITE_ZEROES => self.write_zeroes(memory, disk).map(Step::Transfer),
            VIRTIO_BLK_T_GET_ID => Ok(Step::Done(self.identify(memory, disk.id)?.into())),
            other => Err(RequestError::Unsupported(other)),
        }
    }

    fn read(self, backend: &Backend) -> Result<Io, RequestError> {
        if !self.readable.is_empty() {
            return Err(RequestError::Direction);
        }
        Ok(Io::Read {
            offset: check_transfer(self.sector, self.writable.len(), backend)?,
            into: self.writable,
        })
    }

    fn write(self, disk: &Disk<'_>) -> Result<Io, RequestError> {
        if !self.writable.is_empty() {
            return Err(RequestError::Direction);
        }
        if disk.backend.read_only() {
            return Err(RequestError::ReadOnly);
        }
        Ok(Io::Write {
            offset: check_transfer(self.sector, self.readable.len(), disk.backend)?,
            from: self.readable,
            durability: disk.durability,
        })
    }

    fn discard(self, memory: &GuestMemory, disk: &Disk<'_>) -> Result<Io, RequestError> {
        let segment = self.segment(memory, disk.backend, MOST_DISCARDED)?;
        if segment.flags != 0 {
            return Err(RequestError::Flags { got: segment.flags });
        }
        Ok(Io::Discard {
            offset: segment.offset,
            len: segment.len,
            durability: disk.durability,
        })
    }

    fn write_zeroes(self, memory: &GuestMemory, disk: &Disk<'_>) -> Result<Io, RequestError> {
        let segment = self.segment(memory, disk.backend, MOST_ZEROED)?;
        if segment.flags & !UNMAP != 0 {
            return Err(RequestError::Flags { got: segment.flags });
        }
        Ok(Io::Zero {
            offset: segment.offset,
            len: segment.len,
            unmap: segment.flags & UNMAP != 0,
            durability: disk.durability,
        })
    }

    /// The one range that the request is about.
    fn segment(
        mut self,
        memory: &GuestMemory,
        backend: &Backend,
        most: u32,
    ) -> Result<Segment, RequestError> {
        if !self.writable.is_empty() {
            return Err(RequestError::Direction);
        }
        if backend.read_only() {
            return Err(RequestError::ReadOnly);
        }
        let (len, mut bytes) = (self.readable.len(), [0; SEGMENT_LEN]);
        self.readable.read(memory, &mut bytes)?;
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        if len != SEGMENT_LEN as u64 || sectors > most {
            return Err(RequestError::Segment { most, len, sectors });
        }
        let len = u64::from(sectors) * SECTOR_SIZE;
        Ok(Segment {
            offset: check_range(u64::from_le_bytes(sector), len, backend)?,
            len,
            flags: u32::from_le_bytes([f0, f1, f2, f3]),
        })
    }

    fn identify(mut self, memory: &GuestMemory, id: &[u8; ID_LEN]) -> Result<u32, RequestError> {
        if !self.readable.is_empty() {
            return Err(RequestError::Direction);
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

/// As [`check_range`], for data that is moved.
fn check_transfer(sector: u64, len: u64, backend: &Backend) -> Result<u64, RequestError> {
    if len > MOST_TRANSFERRED {
        return Err(RequestError::TooLong {
            most: MOST_TRANSFERRED,
            len,
        });
    }
    check_range(sector, len, backend)
}

/// The byte offset of `len` bytes from `sector` on, all of which are on the disk.
fn check_range(sector: u64, len: u64, backend: &Backend) -> Result<u64, RequestError> {
    let capacity = backend.sectors();
    if !len.is_multiple_of(SECTOR_SIZE) {
        return Err(RequestError::PartialSector { len });
    }
    let (block, sectors) = (backend.block_size(), len / SECTOR_SIZE);
    if !(sector | sectors).is_multiple_of(u64::from(block) / SECTOR_SIZE) {
        return Err(RequestError::PartialBlock { block, sector, len });
    }
    match sector.checked_add(sectors) {
        Some(end) if end <= capacity => Ok(sector * SECTOR_SIZE),
        _ => Err(RequestError::OutOfRange {
            capacity,
            sector,
            len,
        }),
    }
}
