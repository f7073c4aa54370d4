//! The device: its queues, its configuration space, and what moves with it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use migration_state::Envelope;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::PAGE_SIZE;
use super::control::BalloonControl;
use super::discarder::{BalloonRole, PageDiscarder};
use super::hints::Hints;
use super::state::BalloonState;
use super::statistics::{MOST, Statistics};
use crate::GuestMemory;
use crate::helper::{CancelFlag, Helper, wait_readable};
use crate::log_damper::LogDamper;
use crate::metrics::Counters;
use crate::virtio::device::{RING_FEATURES, read_bytes};
use crate::virtio::{
    Chain, ChainError, ChainHead, Description, DeviceError, HostBackend, HostError, QUEUE_SIZE, QueueAccess,
    QueueError, QueueProgress, Queues, Served, Turn, VirtioDevice,
};

/// The guest uses pages again only after the device has seen them in the deflate queue (virtio 1.2, 5.5.3).
const F_MUST_TELL_HOST: u64 = 1 << 0;
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_FREE_PAGE_HINT: u64 = 1 << 3;
const F_PAGE_POISON: u64 = 1 << 4;
const F_PAGE_REPORTING: u64 = 1 << 5;

/// Offset in the configuration space where the guest writes how many pages it has given up.
const ACTUAL: u64 = 4;
/// Bytes of a page's number in a request.
const PAGE_NUMBER: u64 = 4;
/// Offset in the configuration space where the guest writes the value that it fills freed pages with.
const POISON: u64 = 12;

/// A memory balloon.
pub struct VirtioBalloon {
    control: Arc<BalloonControl>,
    deflate_on_oom: bool,
    /// What each queue is for, as the driver's features have it.
    roles: Vec<BalloonRole>,
    /// The chain that waits for the next request for statistics.
    statistics: Option<ChainHead>,
    discarder: Arc<PageDiscarder>,
    /// The thread that gives pages up; a job's tag is the queue and the chain.
    helper: Helper<(usize, ChainHead), ()>,
}

impl VirtioBalloon {
    /// A balloon that the host controls by `control`. With `deflate_on_oom` a guest that runs out of memory may take
    /// back what it needs.
    pub fn new(control: Arc<BalloonControl>, deflate_on_oom: bool) -> io::Result<Self> {
        Ok(Self {
            discarder: Arc::new(PageDiscarder {
                control: control.clone(),
                warnings: LogDamper::default(),
            }),
            control,
            deflate_on_oom,
            roles: Vec::new(),
            statistics: None,
            helper: Helper::new("balloon")?,
        })
    }

    /// Whether a balloon's `parameters` have `deflate_on_oom`; `None` if they are not a balloon's.
    pub fn deflates_on_oom(parameters: &[u8]) -> Option<bool> {
        match parameters {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }

    /// Hands chains to the helper thread, which gives up their pages: that may block on a userfaultfd handler. The
    /// chains are returned to the driver when that is done.
    fn queue_discards(
        &mut self,
        role: BalloonRole,
        index: usize,
        queue: &mut QueueAccess<'_>,
    ) -> Result<QueueProgress, QueueError> {
        let mut turn = Turn::default();
        while !turn.is_over() {
            if self.helper.len() >= QUEUE_SIZE.into() {
                // The queue is served again when a job is done.
                return Ok(QueueProgress::Idle);
            }
            let Some((head, chain)) = queue.pop()? else {
                return Ok(QueueProgress::Idle);
            };
            turn.count(0);
            let (memory, discarder) = (queue.memory().clone(), self.discarder.clone());
            let pushed = chain.map_err(io::Error::other).and_then(|chain| {
                let job =
                    move |cancelled: &CancelFlag| discarder.discard_chain(role, &memory, chain, cancelled);
                self.helper.push((index, head), Box::new(job))
            });
            if let Err(error) = pushed {
                self.warn(&error);
                queue.add_used(head, 0)?;
                queue.notify()?;
            }
        }
        Ok(QueueProgress::More)
    }

    /// Returns the chains whose pages were given up.
    fn complete_discards(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        while let Some(((index, head), _)) = self.helper.next() {
            if let Some(mut queue) = queues.get(index) {
                queue.add_used(head, 0)?;
                queue.notify()?;
            }
        }
        Ok(())
    }

    /// Handles a chain of hints: it names the command that the guest answers, or pages that the guest does not use.
    fn process_hints(&self, memory: &GuestMemory, mut chain: Chain) {
        let mut id = [0; 4];
        let read = match chain.readable.is_empty() {
            true => Ok(0),
            false => chain.readable.read(memory, &mut id),
        };
        let mut status = self.control.status();
        match read {
            Ok(got) if got == id.len() => status.hints.handle_command_id(u32::from_le_bytes(id)),
            Ok(_) => {}
            Err(error) => self.warn(&error),
        }
        for (address, len) in chain.writable.iter() {
            status.hints.add(address.0, len.into());
        }
        drop(status);
        self.control.notify_waiters();
    }

    /// Takes statistics; their chain is kept until the host asks for newer ones.
    fn process_statistics_queue(
        &mut self,
        queues: &mut Queues<'_>,
        index: usize,
    ) -> Result<QueueProgress, QueueError> {
        let Some(mut queue) = queues.get(index) else {
            return Ok(QueueProgress::Idle);
        };
        let Some((head, chain)) = queue.pop()? else {
            return Ok(QueueProgress::Idle);
        };
        let mut chain = match chain {
            Ok(chain) if head.0 < QUEUE_SIZE => chain,
            malformed => {
                if let Err(error) = malformed {
                    self.warn(&error);
                }
                // Not kept: a restore would refuse a head outside the queue.
                queue.add_used(head, 0)?;
                queue.notify()?;
                return Ok(QueueProgress::More);
            }
        };
        // A driver that sends a second chain gets the first one back.
        if let Some(earlier) = self.statistics.replace(head) {
            queue.add_used(earlier, 0)?;
            queue.notify()?;
        }
        let mut bytes = [0; MOST];
        match chain.readable.read(queue.memory(), &mut bytes) {
            Ok(got) => {
                let mut status = self.control.status();
                status.statistics = Some(Statistics::parse(&bytes[..got]));
                status.statistics_seen += 1;
                drop(status);
                self.control.notify_waiters();
            }
            Err(error) => self.warn(&error),
        }
        Ok(QueueProgress::More)
    }

    fn warn(&self, error: &dyn std::error::Error) {
        self.discarder.warn(error);
    }

    /// Serves a chain, to which nothing is written.
    fn serve_chain(&self, chain: Result<Chain, ChainError>, serve: impl FnOnce(Chain)) -> Served {
        match chain {
            Ok(chain) => serve(chain),
            Err(error) => self.warn(&error),
        }
        Served::default()
    }
}

impl VirtioDevice for VirtioBalloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        let deflate = if self.deflate_on_oom { F_DEFLATE_ON_OOM } else { 0 };
        let hints = F_FREE_PAGE_HINT | F_PAGE_POISON;
        RING_FEATURES | F_MUST_TELL_HOST | F_STATS_VQ | F_PAGE_REPORTING | hints | deflate
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 5]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = self.control.status();
        let config = [status.target, status.actual, status.hints.id(), status.poison].map(u32::to_le_bytes);
        read_bytes(config.as_flattened(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        match data.try_into() {
            Ok(actual) if offset == ACTUAL => self.control.status().actual = u32::from_le_bytes(actual),
            Ok(poison) if offset == POISON => self.control.status().poison = u32::from_le_bytes(poison),
            _ => tracing::debug!(
                offset,
                len = data.len(),
                "virtio-balloon: nothing else in the configuration is writable"
            ),
        }
    }

    /// Queues are numbered without gaps for those that the driver did not negotiate.
    fn activate(&mut self, features: u64) {
        self.roles = vec![BalloonRole::Inflate, BalloonRole::Deflate];
        for (feature, role) in [
            (F_STATS_VQ, BalloonRole::Statistics),
            (F_FREE_PAGE_HINT, BalloonRole::Hinting),
            (F_PAGE_REPORTING, BalloonRole::Reporting),
        ] {
            if features & feature != 0 {
                self.roles.push(role);
            }
        }
        let mut status = self.control.status();
        status.can_hint = features & F_FREE_PAGE_HINT != 0;
        status.poisons = features & F_PAGE_POISON != 0;
    }

    fn process_queue(&mut self, index: usize, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        let role = self.roles.get(index).copied();
        if role == Some(BalloonRole::Statistics) {
            return self.process_statistics_queue(queues, index);
        }
        let Some(mut queue) = queues.get(index) else {
            return Ok(QueueProgress::Idle);
        };
        if let Some(role @ (BalloonRole::Inflate | BalloonRole::Reporting)) = role {
            return self.queue_discards(role, index, &mut queue);
        }
        queue.serve(|memory, chain| {
            self.serve_chain(chain, |chain| match role {
                Some(BalloonRole::Hinting) => self.process_hints(memory, chain),
                // Nothing to do: pages come back when the guest touches them.
                Some(BalloonRole::Deflate) => {
                    let pages = chain.readable.len() / PAGE_NUMBER;
                    self.control.metrics.deflated_bytes.add(pages * PAGE_SIZE);
                }
                _ => {}
            })
        })
    }

    fn host_events(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.control.event(), self.helper.as_fd()]
    }

    fn process_host(&mut self, queues: &mut Queues<'_>) -> Result<QueueProgress, QueueError> {
        self.complete_discards(queues)?;
        self.control.clear_event();
        if std::mem::take(&mut self.control.status().changed) {
            queues.config_changed();
        }
        let index = self
            .roles
            .iter()
            .position(|role| *role == BalloonRole::Statistics);
        if let Some(mut queue) = index.and_then(|index| queues.get(index))
            && let Some(head) = self.statistics
            && std::mem::take(&mut self.control.status().statistics_wanted)
        {
            self.statistics = None;
            queue.add_used(head, 0)?;
            queue.notify()?;
        }
        // The helper may have room for more chains.
        let mut progress = QueueProgress::Idle;
        for index in 0..self.roles.len() {
            if matches!(self.roles[index], BalloonRole::Inflate | BalloonRole::Reporting) {
                progress = progress.and(self.process_queue(index, queues)?);
            }
        }
        Ok(progress)
    }

    /// A new driver begins with an empty balloon; the host's target stays.
    fn reset(&mut self) -> bool {
        self.roles.clear();
        self.statistics = None;
        let mut status = self.control.status();
        status.actual = 0;
        status.poison = 0;
        status.can_hint = false;
        status.hints.reset();
        drop(status);
        self.control.notify_waiters();
        self.helper.cancel();
        while self.helper.next().is_some() {}
        self.helper.is_empty()
    }

    fn drain(&mut self, queues: &mut Queues<'_>, until: Instant) -> Result<(), DeviceError> {
        loop {
            self.complete_discards(queues)?;
            if self.helper.is_empty() {
                return Ok(());
            }
            if Instant::now() >= until {
                let what = "pages that the guest gives up".into();
                return Err(DeviceError::InFlight { what });
            }
            wait_readable([self.helper.as_fd()], until).map_err(HostError::from)?;
        }
    }

    fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let status = self.control.status();
        let state = BalloonState {
            target: status.target,
            actual: status.actual,
            statistics: self.statistics.map(|head| head.0),
            command: status.hints.command(),
            poison: status.poison,
        };
        Ok(envelope.put(instance, &state)?)
    }

    fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), DeviceError> {
        let state: BalloonState = envelope.take(instance)?;
        if let Some(head) = state.statistics.filter(|head| *head >= QUEUE_SIZE) {
            return Err(DeviceError::Mismatch {
                what: "chain of the statistics",
                expected: format!("a descriptor below {QUEUE_SIZE}"),
                got: head.to_string(),
            });
        }
        let mut status = self.control.status();
        status.target = state.target;
        status.actual = state.actual;
        status.poison = state.poison;
        status.hints = Hints::restored(state.command);
        // The guest may not have seen the target on the source, nor that its hinted pages are its own again.
        status.changed = true;
        // A chain that is kept came with statistics on the source.
        status.statistics_seen = state.statistics.is_some().into();
        self.statistics = state.statistics.map(ChainHead);
        Ok(())
    }

    fn describe(&self) -> Description {
        Description {
            parameters: vec![self.deflate_on_oom.into()],
            ..Description::of::<BalloonState>(self.features())
        }
    }

    fn host_backend(&self) -> Option<Arc<dyn HostBackend>> {
        None
    }

    fn metrics(&self) -> Arc<dyn Counters> {
        self.control.metrics.clone()
    }
}
