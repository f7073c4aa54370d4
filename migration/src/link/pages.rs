//! Page content over a data stream.

use std::os::fd::AsFd;

use migration_io::{Gather, GuestMemory, MemoryRange, PageSender, Piece, Scatter, SendPath};

use super::wait::{Patience, Wanted};
use super::{Link, LinkError, encode_header};
use crate::protocol::{CompressedTable, FrameKind, PageTable};

impl Link<'_> {
    /// From here on large pieces of guest memory go without a copy, where the network can do that.
    pub(crate) fn avoid_copies(&mut self) {
        self.sender = Some(PageSender::new(self.connection.as_fd()));
    }

    /// How large pieces of guest memory go.
    pub(crate) fn send_path(&self) -> SendPath {
        self.sender.as_ref().map_or(SendPath::Gather, PageSender::path)
    }

    /// Puts into the log what became of the content so far: why copies are avoided or not is seen nowhere else.
    pub(crate) fn log_sends(&self) {
        if let Some(sender) = &self.sender {
            tracing::debug!(path = ?sender.path(), counters = ?sender.counters(), "sent pages");
        }
    }

    /// Waits until the kernel needs none of the memory that was sent any more.
    pub(crate) fn drain(&mut self) -> Result<(), LinkError> {
        let Some(mut sender) = self.sender.take() else {
            return Ok(());
        };
        let drained = self.drive(
            Wanted::Completions,
            Patience::new(self.io_timeout),
            "completions",
            |socket| sender.drain(socket),
        );
        self.sender = Some(sender);
        drained
    }

    /// Sends a table of compressed pages with their block.
    pub(crate) fn send_compressed(&mut self, table: &CompressedTable, block: &[u8]) -> Result<(), LinkError> {
        let what = "compressed pages";
        let content = postcard::to_stdvec(table).map_err(|source| LinkError::Encode { what, source })?;
        let header = encode_header(FrameKind::Compressed, content.len(), what)?;
        self.send_bytes(&[&header, &content, block], what)
    }

    /// Sends a table of pages with the content of those that have one.
    pub(crate) fn send_pages(&mut self, memory: &GuestMemory, table: &PageTable) -> Result<(), LinkError> {
        let what = "pages";
        let content = postcard::to_stdvec(table).map_err(|source| LinkError::Encode { what, source })?;
        let header = encode_header(FrameKind::Pages, content.len(), what)?;
        let head = [Piece::Bytes(&header), Piece::Bytes(&content)];
        let pages = table.data.iter().map(|span| Piece::Guest((*span).into()));
        let failed = |source| LinkError::Io { what, source };
        let gather = Gather::new(memory, head.into_iter().chain(pages)).map_err(failed)?;
        let len = header.len() as u64 + content.len() as u64 + table.data_bytes();
        self.transmit(gather, len, what)
    }

    /// Sends a table of a disk's pages with the content of those that have one.
    pub(crate) fn send_blocks(&mut self, table: &PageTable, content: &[u8]) -> Result<(), LinkError> {
        let what = "pages of a disk";
        let head = postcard::to_stdvec(table).map_err(|source| LinkError::Encode { what, source })?;
        let header = encode_header(FrameKind::Pages, head.len(), what)?;
        self.send_bytes(&[&header, &head, content], what)
    }

    /// Receives the content of pages in place.
    pub(crate) fn receive_pages(
        &mut self,
        memory: &GuestMemory,
        ranges: &[MemoryRange],
    ) -> Result<(), LinkError> {
        let what = "the content of pages";
        let mut scatter = Scatter::new(memory, ranges).map_err(|source| LinkError::Io { what, source })?;
        let mut receiver = self
            .receiver
            .take()
            .unwrap_or_else(|| migration_io::PageReceiver::new(self.connection.as_fd()));
        let received = self.drive(Wanted::Data, Patience::new(self.io_timeout), what, |socket| {
            receiver.receive(&mut scatter, socket)
        });
        self.receiver = Some(receiver);
        received?;
        self.bytes_received += ranges.iter().map(|range| range.len).sum::<u64>();
        Ok(())
    }

    /// Receives bytes that follow a frame.
    pub(crate) fn receive_bytes(&mut self, buffer: &mut [u8], what: &'static str) -> Result<(), LinkError> {
        self.fill(buffer, Patience::new(self.io_timeout), what)
    }
}
