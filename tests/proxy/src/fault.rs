//! Faults that a proxy injects, and the messages at which it does.

use std::fmt;
use std::time::Duration;

/// Which of a migration's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProxyConnection {
    /// The one that the migration begins on.
    Control,
    /// Data stream number n, from 0.
    Stream(u32),
    /// One on which a source in doubt asks.
    Ask,
}

/// Which way a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// The source sends it.
    ToDestination,
    /// The destination sends it.
    ToSource,
}

/// One message of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FaultPoint {
    /// On which connection it goes.
    pub connection: ProxyConnection,
    /// Which way it goes.
    pub direction: Direction,
    /// Its name in `PROTOCOL.md`; `message 26` if it is newer than this crate, and `garbage` for bytes that are
    /// no frame.
    pub message: String,
    /// How many of the same name went the same way on the same connection before it.
    pub occurrence: u32,
}

/// A fault, and the message that it strikes. It strikes once.
#[derive(Debug)]
pub struct FaultPlan {
    /// Where.
    pub point: FaultPoint,
    /// What.
    pub fault: ProxyFault,
}

/// What becomes of a message and of those around it.
pub enum ProxyFault {
    /// It vanishes; what follows it passes.
    Drop,
    /// It and what follows it comes so much later.
    Delay(Duration),
    /// Half of it passes, then the connection is closed.
    Truncate,
    /// A bit in the middle of this part is flipped.
    Corrupt(FramePart),
    /// It passes twice.
    Duplicate,
    /// It does not pass: the connection is reset, both ways (TCP: RST; Unix sockets have only a close).
    Reset,
    /// Neither it nor anything after it passes in its direction, for so long or for ever; neither side gets an error.
    Stall(Option<Duration>),
    /// It does not pass: the network is gone. All connections are reset, and new ones as soon as they are made,
    /// until [`crate::Proxy::heal`].
    CutAll,
    /// It passes, and from it on the network is so fast, as by [`crate::Proxy::pace`].
    Pace(NetworkPace),
    /// It passes, and the function is called before or after that, on the connection's thread.
    Call(When, Box<dyn FnOnce() + Send>),
}

/// How fast a network is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetworkPace {
    /// As fast as the machine.
    #[default]
    Free,
    /// So many bytes per second on each connection each way. With 0 nothing passes, and neither side gets an error.
    Bytes(u64),
}

/// A part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FramePart {
    /// The kind in the header.
    Kind,
    /// The length in the header; its lowest bit.
    Length,
    /// The message, or the table of pages; an empty one has its kind flipped instead.
    Content,
    /// What follows the frame: the content of pages. Where nothing follows, the frame's own content.
    Data,
}

/// When a function is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before the message passes.
    Before,
    /// After it was handed to the receiver's system.
    After,
}

impl fmt::Debug for ProxyFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProxyFault::Drop => f.write_str("Drop"),
            ProxyFault::Delay(time) => write!(f, "Delay({time:?})"),
            ProxyFault::Truncate => f.write_str("Truncate"),
            ProxyFault::Corrupt(part) => write!(f, "Corrupt({part:?})"),
            ProxyFault::Duplicate => f.write_str("Duplicate"),
            ProxyFault::Reset => f.write_str("Reset"),
            ProxyFault::Stall(time) => write!(f, "Stall({time:?})"),
            ProxyFault::CutAll => f.write_str("CutAll"),
            ProxyFault::Pace(pace) => write!(f, "Pace({pace:?})"),
            ProxyFault::Call(when, _) => write!(f, "Call({when:?})"),
        }
    }
}

impl fmt::Display for FaultPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            connection,
            direction,
            message,
            occurrence,
        } = self;
        write!(f, "{connection:?} {direction:?} {message:?} #{occurrence}")
    }
}
