//! The migration engine: moves a running machine from one process to another, without knowing what the
//! machine is made of.
//!
//! A machine is a [`Source`] or a [`Destination`] to the engine; [`migrate`] and [`Receiver`] are the two ends
//! of one migration. `PROTOCOL.md` says what goes over the wire, `DESIGN.md` how the
//! parts fit together; both lie beside this crate's `Cargo.toml`.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]
// Tests start threads that may take their test along.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod commit;
mod control;
mod converge;
mod destination;
mod digest;
mod link;
mod options;
mod page_set;
mod ports;
mod protocol;
mod report;
mod source;
mod space;
#[cfg(test)]
mod tests;
mod text;
mod transport;

pub use control::{Control, Decision, Phase, Progress};
pub use destination::{ReceiveError, Received, Receiver};
pub use link::LinkError;
pub use migration_io::{GuestMemory, MemoryRange, PAGE_SIZE};
pub use options::{
    Compression, MAX_PAUSE, MAX_STREAMS, MAX_THROTTLE, MigrateOptions, OnMiss, ReceiveOptions,
};
pub use page_set::{PageSet, PageSetError, Ranges};
pub use ports::{
    BlankDisk, CpuidLeaf, Destination, DeviceDescription, Difference, DirtyLog, DiskMark, MachineDescription,
    MemoryKind, MemoryRegion, OfferedDisks, PortError, Rehearsal, Source, SourceDisk, VcpuTime,
};
pub use report::{DataPath, Downtime, IntervalMs, MemoryDigest, Outcome, RehearsalPauses, Report, Round};
pub use source::{Answer, AskError, Doubt, Migrated, Remains, migrate};
pub use text::{chain, list};
pub use transport::{Endpoint, EndpointError, TransportError};
