//! Free page hinting (virtio 1.2, 5.5.6.7): on request the guest reports the pages that it does not use at the moment.
//!
//! ```text
//!  Stopped ─▶ Requested ── the command's id ──▶ Answering ── another id ──▶ Answered
//!                └────────────────────┴─────────── Done ◀───────────────────┘
//! ```
//!
//! The guest does not use the pages that it reports until it sees Done, but it takes them back without notice when it
//! runs short of memory. So a hint is no promise about the future; it only means that the page's content at the time of
//! the report no longer matters.

/// The id in the configuration space before the first command.
const STOP: u32 = 0;
/// The id after a command: the guest has its pages back.
const DONE: u32 = 1;
/// The least id of a command.
const FIRST_COMMAND: u32 = 2;

/// Most ranges that are kept of one answer: 256 GiB in blocks of 4 MiB, as Linux reports them.
pub(super) const MAX_RANGES: usize = 1 << 16;

/// The last command and the guest's answer.
#[derive(Debug, Default)]
pub(super) struct Hints {
    /// The id of the last command, 0 before the first. The guest does not answer the same id twice.
    command: u32,
    stage: HintStage,
    /// Addresses and lengths in bytes from the guest, untrusted.
    ranges: Vec<(u64, u64)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum HintStage {
    #[default]
    Stopped,
    Requested,
    Answering,
    Answered,
    Done,
}

impl Hints {
    /// The hints after a restore: no command is open, and the guest gets back all pages that it reported.
    pub(super) fn restored(command: u32) -> Self {
        let stage = if command == 0 {
            HintStage::Stopped
        } else {
            HintStage::Done
        };
        Self {
            command,
            stage,
            ranges: Vec::new(),
        }
    }

    /// The id of the last command.
    pub(super) fn command(&self) -> u32 {
        self.command
    }

    /// The id that the configuration space shows.
    pub(super) fn id(&self) -> u32 {
        match self.stage {
            HintStage::Stopped => STOP,
            HintStage::Requested | HintStage::Answering | HintStage::Answered => self.command,
            HintStage::Done => DONE,
        }
    }

    /// Starts a new command.
    pub(super) fn request(&mut self) {
        self.command = self.command.wrapping_add(1).max(FIRST_COMMAND);
        self.stage = HintStage::Requested;
        self.ranges.clear();
    }

    /// Whether the guest may still report pages.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.stage, HintStage::Requested | HintStage::Answering)
    }

    /// Ends the command and returns what the guest has reported; the guest gets its pages back.
    pub(super) fn finish(&mut self) -> Vec<(u64, u64)> {
        self.stage = HintStage::Done;
        std::mem::take(&mut self.ranges)
    }

    /// Handles an id from the guest: that of the command begins its answer, another one ends it.
    pub(super) fn handle_command_id(&mut self, id: u32) {
        match self.stage {
            HintStage::Requested if id == self.command => self.stage = HintStage::Answering,
            HintStage::Answering if id != self.command => self.stage = HintStage::Answered,
            // An answer to an earlier command, or to none.
            _ => {}
        }
    }

    /// Adds a range that the guest reports. Outside an answer to the command it is ignored.
    pub(super) fn add(&mut self, address: u64, len: u64) {
        if self.stage == HintStage::Answering && self.ranges.len() < MAX_RANGES {
            self.ranges.push((address, len));
        }
    }

    /// The driver was reset: no command is open and the guest keeps no pages back.
    pub(super) fn reset(&mut self) {
        self.stage = HintStage::Stopped;
        self.ranges.clear();
    }
}
