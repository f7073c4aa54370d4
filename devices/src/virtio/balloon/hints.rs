//! What the guest does not use at the moment, told on request (virtio 1.2, 5.5.6.7, free page hinting).
//!
//! ```text
//!  Stop ──▶ Asked ── the command's id ──▶ Telling ── another id ──▶ Told
//!             └───────────────────┴─────── Done ◀─────────────────────┘
//! ```
//!
//! The guest keeps what it tells out of its own hands until it sees Done, or takes it back when it runs short, without
//! a word. So a hint says nothing of later; only that what the page held when it was told counts no more.

/// Ids in the configuration space that are no command's.
const STOP: u32 = 0;
const DONE: u32 = 1;
const FIRST_COMMAND: u32 = 2;

/// Ranges that are kept of one answer: 256 GiB in blocks of 4 MiB, as Linux tells them.
pub(super) const MOST_RANGES: usize = 1 << 16;

/// A question and what came of it.
#[derive(Debug, Default)]
pub(super) struct Hints {
    /// The id of the last command, 0 before the first. The guest does not answer the same one twice.
    command: u32,
    stage: HintStage,
    /// Address and length in bytes, as the guest says: untrusted.
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
    /// As they are where the machine comes to: nothing is asked, and the guest is to have back whatever it keeps.
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

    /// What the configuration space says.
    pub(super) fn id(&self) -> u32 {
        match self.stage {
            HintStage::Stopped => STOP,
            HintStage::Requested | HintStage::Answering | HintStage::Answered => self.command,
            HintStage::Done => DONE,
        }
    }

    /// Asks anew.
    pub(super) fn request(&mut self) {
        self.command = self.command.wrapping_add(1).max(FIRST_COMMAND);
        self.stage = HintStage::Requested;
        self.ranges.clear();
    }

    /// Whether the guest may have more to tell.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.stage, HintStage::Requested | HintStage::Answering)
    }

    /// Takes what was told, and wants no more: the guest can have its pages back.
    pub(super) fn finish(&mut self) -> Vec<(u64, u64)> {
        self.stage = HintStage::Done;
        std::mem::take(&mut self.ranges)
    }

    /// The guest says which command it answers, or that it has answered.
    pub(super) fn handle_command_id(&mut self, id: u32) {
        match self.stage {
            HintStage::Requested if id == self.command => self.stage = HintStage::Answering,
            HintStage::Answering if id != self.command => self.stage = HintStage::Answered,
            // An answer to an earlier one, or to nothing.
            _ => {}
        }
    }

    /// The guest tells a range. Not in an answer to the command, it means nothing.
    pub(super) fn add(&mut self, address: u64, len: u64) {
        if self.stage == HintStage::Answering && self.ranges.len() < MOST_RANGES {
            self.ranges.push((address, len));
        }
    }

    /// The guest starts anew, and keeps nothing.
    pub(super) fn reset(&mut self) {
        self.stage = HintStage::Stopped;
        self.ranges.clear();
    }
}
