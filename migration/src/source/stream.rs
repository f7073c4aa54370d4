//! One data stream: clears the marks of a chunk of pages, reads the pages, and sends them in batches.
//!
//! The order matters: a mark that is cleared after its page was read would lose a write.

use std::sync::atomic::Ordering;
use std::time::Instant;

use migration_io::{MemoryRange, PAGE_SIZE, SendPath, zero_pages};

use super::MigrateError;
use super::crew::Crew;
use super::pass::{Chunk, runs};
use super::space::{DiskRegion, read_failed};
use super::squeeze::Squeeze;
use crate::link::Link;
use crate::options::Compression;
use crate::protocol::{CompressedTable, MAX_BATCH_BYTES, MAX_BATCH_RANGES, Message, PageTable, Span};
use crate::space::is_disk;

/// A stream and the batch that it fills.
pub(super) struct PageStream<'a> {
    crew: &'a Crew<'a>,
    link: Link<'a>,
    squeeze: Option<Squeeze>,
    table: PageTable,
    /// The content of the table's pages if they are a disk's; memory's pages are sent from where they are.
    content: Vec<u8>,
    /// A run of a disk's pages.
    run: Vec<u8>,
    data_bytes: u64,
    zero_bytes: u64,
}

impl<'a> PageStream<'a> {
    pub(super) fn new(crew: &'a Crew<'a>, mut link: Link<'a>) -> Result<Self, MigrateError> {
        link.avoid_copies();
        Ok(Self {
            crew,
            link,
            squeeze: crew.compression.map(Squeeze::new).transpose()?,
            table: PageTable::default(),
            content: Vec::new(),
            run: Vec::new(),
            data_bytes: 0,
            zero_bytes: 0,
        })
    }

    /// Sends a chunk, in batches: many scattered pages take one system call, and zero pages a few bytes.
    pub(super) fn send(&mut self, chunk: &Chunk) -> Result<(), MigrateError> {
        let space = &self.crew.space;
        space.clear(chunk)?;
        let most = self.crew.pacer.batch_bytes(MAX_BATCH_BYTES).max(PAGE_SIZE);
        if let Some(disk) = space.disk(chunk.region) {
            return self.send_blocks(chunk, disk, most);
        }
        for (gpa, bits) in chunk.groups() {
            let zero = zero_pages(space.memory, gpa, bits)?;
            for range in runs(gpa, bits & zero) {
                self.add_zero(range)?;
            }
            for range in runs(gpa, bits & !zero) {
                self.add_data(range, most)?;
            }
        }
        // Spans of one table must not reach over regions, and the next chunk may be anywhere.
        self.flush()
    }

    /// Ends a pass: sends a message behind its pages, and waits until the kernel no longer reads guest memory for them.
    pub(super) fn finish(&mut self, message: &Message) -> Result<(), MigrateError> {
        self.link.send(message)?;
        self.link.drain()?;
        // Only now do all completions say whether the kernel copied.
        if self.link.send_path() == SendPath::Zerocopy {
            self.crew.counts.zerocopy.store(true, Ordering::Relaxed);
        }
        self.link.log_sends();
        Ok(())
    }

    /// Sends a chunk of a disk.
    fn send_blocks(&mut self, chunk: &Chunk, disk: &DiskRegion, most: u64) -> Result<(), MigrateError> {
        for (gpa, bits) in chunk.groups() {
            for range in runs(gpa, bits) {
                let offset = range.gpa - disk.region.gpa;
                self.run.clear();
                self.run.resize(range.len as usize, 0);
                // The last page may reach beyond the disk's end; the rest of it is zero.
                let len = range.len.min(disk.port.size().saturating_sub(offset));
                disk.port
                    .read(offset, &mut self.run[..len as usize])
                    .map_err(read_failed)?;
                let run = std::mem::take(&mut self.run);
                for (gpa, page) in (range.gpa..)
                    .step_by(PAGE_SIZE as usize)
                    .zip(run.chunks(PAGE_SIZE as usize))
                {
                    let page_range = MemoryRange { gpa, len: PAGE_SIZE };
                    if page.iter().all(|byte| *byte == 0) {
                        self.add_zero(page_range)?;
                    } else {
                        self.add_data(page_range, most)?;
                        self.content.extend_from_slice(page);
                    }
                }
                self.run = run;
            }
        }
        self.flush()
    }

    fn add_zero(&mut self, range: MemoryRange) -> Result<(), MigrateError> {
        let full = self.table.zero.len() == MAX_BATCH_RANGES;
        if full || self.zero_bytes + range.len > MAX_BATCH_BYTES * MAX_BATCH_RANGES as u64 {
            self.flush()?;
        }
        self.zero_bytes += range.len;
        append(&mut self.table.zero, range);
        Ok(())
    }

    fn add_data(&mut self, mut range: MemoryRange, most: u64) -> Result<(), MigrateError> {
        while range.len > 0 {
            if self.data_bytes >= most || self.table.data.len() == MAX_BATCH_RANGES {
                self.flush()?;
            }
            let room = (most - self.data_bytes).next_multiple_of(PAGE_SIZE);
            let len = range.len.min(room).min(MAX_BATCH_BYTES - self.data_bytes);
            let piece = MemoryRange { gpa: range.gpa, len };
            self.data_bytes += len;
            append(&mut self.table.data, piece);
            range.gpa += len;
            range.len -= len;
        }
        Ok(())
    }

    /// Sends the batch's pages with content as a compressed block. Its zero pages stay in the table.
    fn send_block(&mut self, method: Compression, block: &[u8]) -> Result<(), MigrateError> {
        let table = CompressedTable {
            method,
            pages: std::mem::take(&mut self.table.data),
            len: u32::try_from(block.len()).unwrap_or(u32::MAX),
        };
        Ok(self.link.send_compressed(&table, block)?)
    }

    /// Sends the batch, if there is anything in it.
    fn flush(&mut self) -> Result<(), MigrateError> {
        if self.data_bytes + self.zero_bytes == 0 {
            return Ok(());
        }
        let memory = self.crew.space.memory;
        let block = match &mut self.squeeze {
            Some(squeeze) if self.data_bytes > 0 && self.content.is_empty() => {
                squeeze.compress(memory, &self.table.data)?
            }
            _ => None,
        };
        let content = block.as_ref().map_or(self.data_bytes, |block| block.len() as u64);
        let (began, before) = (Instant::now(), self.link.bytes_sent());
        self.crew
            .wait_unless_ending(self.crew.pacer.book(content, began))?;
        if let (Some(block), Some(method)) = (&block, self.crew.compression) {
            self.send_block(method, block)?;
        }
        if !self.content.is_empty() {
            self.link.send_blocks(&self.table, &self.content)?;
        } else if !self.table.data.is_empty() || !self.table.zero.is_empty() {
            self.link.send_pages(memory, &self.table)?;
        }
        let sent = self.link.bytes_sent() - before;
        if let Some(squeeze) = &mut self.squeeze {
            squeeze.learn(sent, began.elapsed());
        }
        self.count(sent);
        self.content.clear();
        self.table.data.clear();
        self.table.zero.clear();
        (self.data_bytes, self.zero_bytes) = (0, 0);
        Ok(())
    }

    /// Counts a batch that was sent in this many bytes.
    fn count(&self, sent: u64) {
        let counts = &self.crew.counts;
        let (data, zero) = (self.data_bytes / PAGE_SIZE, self.zero_bytes / PAGE_SIZE);
        counts.wire.fetch_add(sent, Ordering::Relaxed);
        counts.data.fetch_add(data, Ordering::Relaxed);
        counts.zero.fetch_add(zero, Ordering::Relaxed);
        let mut spans = self.table.data.iter().chain(&self.table.zero);
        if spans.any(|span| is_disk(span.gpa)) {
            counts.disk_data.fetch_add(data, Ordering::Relaxed);
            counts.disk_zero.fetch_add(zero, Ordering::Relaxed);
        }
    }
}

/// Adds a range; extends the last span if the range begins at its end.
fn append(spans: &mut Vec<Span>, range: MemoryRange) {
    match spans.last_mut() {
        Some(last) if last.gpa + last.len == range.gpa => last.len += range.len,
        _ => spans.push(range.into()),
    }
}
