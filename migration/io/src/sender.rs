//! How content gets to a socket: copied by the kernel, or read by the network card from guest memory.

use std::os::fd::BorrowedFd;

use rustix::net::sockopt::socket_error;

use crate::vectors::{Limit, VectorRun};
use crate::zerocopy::{Completion, enable, next_completion};
use crate::{CallProgress, Gather, MemoryIoError};

/// The least bytes to send with MSG_ZEROCOPY: to copy fewer takes less time than to pin their pages and to read their
/// completion.
const MIN_ZEROCOPY: usize = 32 << 10;

/// The most sends under way: bounds the completions that the kernel keeps for this socket.
const MAX_PENDING: u64 = 256;

/// Probes that have to be copied, all of them, before the network counts as one that always is. Where it is not,
/// the kernel still copies some, say because it has to change a packet that the card's driver has not let go of:
/// one in eight between emulated hosts with virtio-net, but most of those that come first on a connection.
const PROBES: u64 = 16;

/// The most bytes of a probe: one that is copied after all takes several times as long as an ordinary send.
const PROBE_BYTES: usize = 64 << 10;

/// How many completions show whether most sends are copied: many more than come first on a connection.
const WINDOW: u64 = 96;

/// How content gets to the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendPath {
    /// The kernel copies it from guest memory.
    Gather,
    /// The network card reads it from guest memory (MSG_ZEROCOPY), as completions have shown.
    Zerocopy,
}

/// What a [`PageSender`] did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendCounters {
    /// Bytes sent the ordinary way, headers included.
    pub gather_bytes: u64,
    /// Bytes sent with MSG_ZEROCOPY.
    pub zerocopy_bytes: u64,
    /// Calls with MSG_ZEROCOPY.
    pub zerocopy_sends: u64,
    /// Those that the kernel is done with.
    pub completed: u64,
    /// Those of the completed ones whose content the kernel copied after all.
    pub copied: u64,
    /// Calls with MSG_ZEROCOPY that the kernel had no memory for (or no locked memory); sent as usual.
    pub no_buffers: u64,
}

/// Sends [`Gather`]s over one socket, without a copy where the kernel and the network can do without.
///
/// On TCP a large piece of guest memory goes out with MSG_ZEROCOPY as a probe, everything else as usual until
/// its completion comes. It says whether the kernel copied. If it did, another piece is tried, and after a
/// number of those everything is gathered (loopback, veth, cards without scatter-gather). Once it did not, all
/// large pieces of guest memory take that way, until most completions of a while say that they were copied.
/// Headers are always copied, so they may change as soon as they are sent. On any other socket everything is
/// gathered.
///
/// While sends are [`pending`](Self::pending), poll(2) reports POLLERR for the socket whenever completions
/// can be read, asked for or not; [`send`](Self::send) and [`drain`](Self::drain) read them.
#[derive(Debug)]
pub struct PageSender {
    mode: SendMode,
    counters: SendCounters,
    /// Completions since the last judgement, and how many of them were copied.
    unjudged: (u64, u64),
}

/// How large pieces of guest memory are sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SendMode {
    /// They are copied.
    Gather,
    /// One at a time without a copy, to learn from its completion whether the kernel copied it after all.
    Probing,
    /// Without a copy.
    Zerocopy,
}

/// One call of sendmsg.
struct SendCall {
    limit: Limit,
    flags: libc::c_int,
    zerocopy: bool,
}

impl PageSender {
    /// For a socket, which every later call must name again.
    pub fn new(socket: BorrowedFd<'_>) -> Self {
        let mode = if enable(socket) {
            SendMode::Probing
        } else {
            SendMode::Gather
        };
        Self {
            mode,
            counters: SendCounters::default(),
            unjudged: (0, 0),
        }
    }

    /// Sends as much as the socket takes now, like [`Gather::step`], in one system call besides those that
    /// read completions: it may say `Moved` although the socket would take more.
    pub fn send(
        &mut self,
        gather: &mut Gather<'_>,
        socket: BorrowedFd<'_>,
    ) -> Result<CallProgress, MemoryIoError> {
        self.read_completions(socket)?;
        let plan = self.plan(gather);
        let before = gather.vectors.moved();
        let mut progress = gather.vectors.send(socket, plan.limit, plan.flags);
        if plan.zerocopy && progress.as_ref().is_err_and(is_out_of_buffers) {
            self.count_no_buffers();
            progress = gather.vectors.send(socket, plan.limit, 0);
        } else if plan.zerocopy
            && progress
                .as_ref()
                .is_ok_and(|moved| *moved != CallProgress::WouldBlock)
        {
            self.counters.zerocopy_sends += 1;
            self.counters.zerocopy_bytes += gather.vectors.moved() - before;
            return progress;
        }
        self.counters.gather_bytes += gather.vectors.moved() - before;
        progress
    }

    /// Reads completions, without waiting: `Done` when the kernel needs none of the memory any more,
    /// `WouldBlock` when it still does: wait for POLLERR on the socket, which needs no flag, and call again.
    pub fn drain(&mut self, socket: BorrowedFd<'_>) -> Result<CallProgress, MemoryIoError> {
        self.read_completions(socket)?;
        if self.pending() == 0 {
            return Ok(CallProgress::Done);
        }
        // A socket that failed reports POLLERR as well, and its error is read only here.
        match socket_error(socket) {
            Ok(Ok(())) => Ok(CallProgress::WouldBlock),
            Ok(Err(error)) | Err(error) => Err(MemoryIoError::Socket(error.into())),
        }
    }

    /// How many sends there are whose guest memory the kernel may still read.
    pub fn pending(&self) -> u64 {
        self.counters.zerocopy_sends - self.counters.completed
    }

    /// The way that large pieces of guest memory take now.
    pub fn path(&self) -> SendPath {
        match self.mode {
            SendMode::Gather | SendMode::Probing => SendPath::Gather,
            SendMode::Zerocopy => SendPath::Zerocopy,
        }
    }

    /// What was done so far.
    pub fn counters(&self) -> SendCounters {
        self.counters
    }

    /// What to send next, and how.
    fn plan(&self, gather: &Gather<'_>) -> SendCall {
        let everything = SendCall {
            limit: Limit::NONE,
            flags: 0,
            zerocopy: false,
        };
        if self.mode == SendMode::Gather {
            return everything;
        }
        match gather.vectors.runs() {
            [Some(front), _] if self.takes_zerocopy(front) => SendCall {
                limit: Limit {
                    vectors: front.vectors,
                    bytes: match self.mode {
                        SendMode::Probing => PROBE_BYTES,
                        _ => usize::MAX,
                    },
                },
                flags: libc::MSG_ZEROCOPY,
                zerocopy: true,
            },
            [Some(front), Some(next)] if self.takes_zerocopy(next) => SendCall {
                limit: Limit {
                    vectors: front.vectors,
                    ..Limit::NONE
                },
                // The header does not go out as a packet of its own: its content follows at once.
                flags: libc::MSG_MORE,
                zerocopy: false,
            },
            _ => everything,
        }
    }

    /// Whether a run is to be sent with MSG_ZEROCOPY.
    fn takes_zerocopy(&self, run: VectorRun) -> bool {
        let most = match self.mode {
            SendMode::Gather => 0,
            SendMode::Probing => 1,
            SendMode::Zerocopy => MAX_PENDING,
        };
        run.guest && run.bytes >= MIN_ZEROCOPY && self.pending() < most
    }

    /// Counts a call for which the kernel had no memory.
    fn count_no_buffers(&mut self) {
        self.counters.no_buffers += 1;
        if self.pending() == 0 {
            // No send of this socket holds memory in the kernel, so waiting would not help.
            self.mode = SendMode::Gather;
        }
    }

    /// Reads the completions that there are.
    fn read_completions(&mut self, socket: BorrowedFd<'_>) -> Result<(), MemoryIoError> {
        while self.pending() > 0 {
            match next_completion(socket).map_err(MemoryIoError::Socket)? {
                Some(completion) => self.count_completion(completion),
                None => break,
            }
        }
        Ok(())
    }

    /// Counts a completion, and changes the mode by what completions have shown.
    fn count_completion(&mut self, completion: Completion) {
        let sends = completion.sends.min(self.pending());
        if sends == 0 {
            return;
        }
        let copied = if completion.copied { sends } else { 0 };
        self.counters.completed += sends;
        self.counters.copied += copied;
        self.unjudged.0 += sends;
        self.unjudged.1 += copied;
        self.mode = match (self.mode, self.unjudged) {
            (SendMode::Probing, _) if copied == 0 => SendMode::Zerocopy,
            (SendMode::Probing, (completed, _)) if completed >= PROBES => SendMode::Gather,
            (SendMode::Zerocopy, (completed, copied)) if completed >= WINDOW => {
                if copied * 2 > completed {
                    SendMode::Gather
                } else {
                    SendMode::Zerocopy
                }
            }
            _ => return,
        };
        self.unjudged = (0, 0);
    }
}

fn is_out_of_buffers(error: &MemoryIoError) -> bool {
    matches!(error, MemoryIoError::Socket(error) if error.raw_os_error() == Some(libc::ENOBUFS))
}

#[cfg(test)]
mod tests;
