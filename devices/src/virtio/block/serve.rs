//! How a disk serves its queue: requests are started as they come, and answered as they are done.

use std::io;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};

use super::device::VirtioBlock;
use super::engine::{Origin, Ticket};
use super::error::BlockRequestError;
use super::request::{BlockRequest, OK, RequestStep, RequestTarget};
use crate::GuestMemory;
use crate::virtio::{
    Chain, ChainError, ChainHead, DeviceError, HostError, QueueAccess, QueueError, QueueProgress, Queues,
    Served, Turn,
};

impl VirtioBlock {
    /// Starts and completes requests until nothing more can be done now, or the turn is over.
    pub(super) fn process_requests(
        &mut self,
        queue: &mut QueueAccess<'_>,
    ) -> Result<QueueProgress, QueueError> {
        let (mut turn, mut answered) = (Turn::default(), 0);
        let progress = loop {
            let before = answered;
            self.start_requests(queue, &mut turn, &mut answered)?;
            self.complete_requests(queue, &mut answered)?;
            if turn.is_over() || self.engine.is_queued() {
                break QueueProgress::More;
            }
            // The driver may have reacted to the answers with new requests.
            if answered == before {
                break QueueProgress::Idle;
            }
        };
        if answered > 0 {
            queue.notify()?;
        }
        self.schedule_write_out();
        Ok(progress)
    }

    /// Starts requests until the queue is empty, the turn is over, or something keeps the next one waiting.
    fn start_requests(
        &mut self,
        queue: &mut QueueAccess<'_>,
        turn: &mut Turn,
        answered: &mut u64,
    ) -> Result<(), QueueError> {
        while !turn.is_over() && self.engine.has_room() && !self.settling {
            let Some((head, chain)) = queue.pop()? else { break };
            let len = chain.as_ref().map_or(0, Chain::len);
            if !self.limiter.try_consume(len) {
                self.metrics.throttled.add(1);
                queue.undo_pop();
                break;
            }
            let served = self.start_request(queue.memory(), head, chain);
            turn.count(len);
            if let Some(served) = served {
                queue.add_used(head, served.written)?;
                *answered += 1;
            }
        }
        Ok(())
    }

    /// Completes the requests that are done, and submits the others again.
    fn complete_requests(
        &mut self,
        queue: &mut QueueAccess<'_>,
        answered: &mut u64,
    ) -> Result<(), QueueError> {
        loop {
            if let Err(error) = self.engine.submit() {
                self.warn(&error);
            }
            let before = *answered;
            while let Some((origin, result)) = self.engine.next(&self.backend) {
                if let Origin::Guest(ticket) = origin {
                    let written = self.complete_guest(queue.memory(), ticket, result);
                    queue.add_used(ticket.head, written)?;
                } else {
                    self.complete_own(origin, result);
                }
                *answered += 1;
            }
            // A transfer that is done in part was queued again.
            if !self.engine.is_queued() || *answered == before {
                return Ok(());
            }
        }
    }

    /// Completes a flush or write-out of the device's own.
    fn complete_own(&mut self, origin: Origin, result: Result<u32, BlockRequestError>) {
        match origin {
            Origin::Guest(_) => return,
            Origin::Flush => self.settling = false,
            Origin::WriteOut => self.set_write_out_running(false),
        }
        if let Err(error) = result {
            self.warn(&error);
        }
    }

    /// Starts to write an image's metadata to its file, if any are in this process's memory only.
    pub(super) fn start_write_out(&mut self) {
        let begun = self.engine.start_write_out(&self.backend);
        self.set_write_out_running(matches!(begun, Ok(true)));
        if let Err(error) = begun {
            self.warn(&error);
        }
    }

    /// Notes whether a write-out is running, and schedules the next one if not.
    fn set_write_out_running(&mut self, is_running: bool) {
        if let Some(write_out) = &mut self.write_out {
            write_out.set_running(is_running);
        }
        self.schedule_write_out();
    }

    /// Schedules the next write-out, unless one is running.
    fn schedule_write_out(&mut self) {
        if let Some(Err(error)) = self.write_out.as_mut().map(|due| due.schedule(&self.backend)) {
            self.warn(&error);
        }
    }

    /// Applies a new size and new rate limits from the host.
    pub(super) fn apply_control(&mut self, queues: &Queues<'_>) {
        if !self.control.clear_event() {
            return;
        }
        let limits = self.control.limits();
        if limits != self.parameters.limits {
            self.parameters.limits = limits;
            self.limiter.set(limits);
        }
        let sectors = self.backend.sectors();
        if std::mem::replace(&mut self.sectors, sectors) != sectors {
            queues.config_changed();
        }
    }

    /// Waits until nothing is in flight, and completes the requests. Returns the error of a broken queue, if it is
    /// broken: then, and where the driver has reset the device, the requests in flight end without an answer.
    pub(super) fn drain_in_flight(
        &mut self,
        queues: &mut Queues<'_>,
        until: Instant,
    ) -> Result<Option<QueueError>, DeviceError> {
        let mut broken = None;
        while !self.engine.is_empty() {
            match queues.get(0) {
                Some(mut queue) if broken.is_none() => {
                    let done = self
                        .complete_requests(&mut queue, &mut 0)
                        .and_then(|()| queue.notify());
                    broken = done.err();
                }
                _ => self.complete_unanswered().map_err(HostError::from)?,
            }
            if !self.engine.is_empty() {
                if Instant::now() >= until {
                    let disk = self.backend.path().display().to_string();
                    return Err(DeviceError::InFlight { what: disk });
                }
                self.engine.wait(until).map_err(HostError::from)?;
            }
        }
        Ok(broken)
    }

    /// Completes I/O without answering the guest. The device's own flushes and write-outs still count.
    fn complete_unanswered(&mut self) -> io::Result<()> {
        self.engine.submit()?;
        while let Some((origin, result)) = self.engine.next_unanswered(&self.backend) {
            self.complete_own(origin, result);
        }
        Ok(())
    }

    /// Completes a guest's request. Returns the bytes that were written to its buffers.
    fn complete_guest(
        &self,
        memory: &GuestMemory,
        ticket: Ticket,
        result: Result<u32, BlockRequestError>,
    ) -> u32 {
        match result {
            Ok(written) => {
                self.metrics.count_done(ticket.kind, ticket.data);
                self.write_status(memory, ticket.status, OK, written.into())
                    .written
            }
            Err(error) => self.fail_request(memory, ticket.status, &error).written,
        }
    }

    /// Starts a request; returns its outcome if it is done at once.
    fn start_request(
        &mut self,
        memory: &GuestMemory,
        head: ChainHead,
        chain: Result<Chain, ChainError>,
    ) -> Option<Served> {
        let chain = match chain {
            Ok(chain) => chain,
            Err(error) => {
                self.warn(&error);
                return Some(Served::default());
            }
        };
        let request = match BlockRequest::parse(memory, chain) {
            Ok(request) => request,
            Err((Some(status), error)) => return Some(self.fail_request(memory, status, &error)),
            Err((None, error)) => {
                self.warn(&error);
                return Some(Served::default());
            }
        };
        let mut ticket = Ticket {
            head,
            status: request.status,
            kind: request.kind,
            data: request.len(),
        };
        let disk = RequestTarget {
            backend: &self.backend,
            id: &self.id,
            cache: self.parameters.cache,
            durability: self.durability(),
        };
        let served = match request.execute(memory, &disk) {
            Ok(RequestStep::Done(served)) => Ok(served),
            Ok(RequestStep::Transfer(io)) => {
                if let Some(range) = io.range() {
                    // The chain holds only the range, not its bytes.
                    ticket.data = range;
                    self.limiter.consume_bytes(range);
                }
                match self.engine.start(memory, &self.backend, ticket, io) {
                    Ok(Some(written)) => Ok(written.into()),
                    Ok(None) => return None,
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        };
        Some(match served {
            Ok(served) => {
                self.metrics.count_done(ticket.kind, ticket.data);
                self.write_status(memory, ticket.status, OK, served)
            }
            Err(error) => self.fail_request(memory, ticket.status, &error),
        })
    }

    /// Reports a failed request to the guest, by its status byte.
    fn fail_request(&self, memory: &GuestMemory, status: GuestAddress, error: &BlockRequestError) -> Served {
        self.warn(error);
        self.write_status(memory, status, error.status(), Served::default())
    }

    /// Writes the status byte, and counts it among the bytes written.
    fn write_status(&self, memory: &GuestMemory, status: GuestAddress, value: u8, served: Served) -> Served {
        match memory.write_obj(value, status) {
            Ok(()) => Served {
                written: served.written.saturating_add(1),
                ..served
            },
            Err(error) => {
                self.warn(&error);
                served
            }
        }
    }

    /// Counts a failure, and logs it unless there were many.
    pub(super) fn warn(&self, error: &dyn std::error::Error) {
        self.metrics.failed.add(1);
        if let Some(count) = self.warnings.count() {
            let disk = self.backend.path().display();
            tracing::warn!(%disk, count, "virtio-block: request failed: {error}");
        }
    }
}
