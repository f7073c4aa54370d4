//! Files that come with a frame (unix(7), `SCM_RIGHTS`).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use migration_io::{CallProgress, MemoryIoError};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::wait::{Patience, Wanted};
use super::{Link, LinkError, encode_frame};
use crate::protocol::{HEADER_LEN, Message};

/// Most files that Linux passes at a time (`SCM_MAX_FD`).
const MAX_FILES: usize = 253;

impl Link<'_> {
    /// Sends a message with open files; only over a Unix socket.
    pub(crate) fn send_with_files(
        &mut self,
        message: &Message,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), LinkError> {
        let bytes = encode_frame(message)?;
        let mut at = 0;
        self.send_whole(bytes.len() as u64, message.name(), |socket| {
            if at == bytes.len() {
                return Ok(CallProgress::Done);
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            // The files travel with the first byte.
            if at == 0 && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
                return Err(MemoryIoError::Socket(
                    std::io::ErrorKind::ArgumentListTooLong.into(),
                ));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(socket, &[IoSlice::new(&bytes[at..])], &mut ancillary, flags) {
                Ok(moved) => {
                    at += moved;
                    Ok(CallProgress::Moved(moved))
                }
                Err(rustix::io::Errno::AGAIN) => Ok(CallProgress::WouldBlock),
                Err(rustix::io::Errno::INTR) => Ok(CallProgress::Moved(0)),
                Err(error) => Err(MemoryIoError::Socket(error.into())),
            }
        })
    }

    /// Receives a message, and the files that come with its first bytes.
    pub(crate) fn receive_with_files(
        &mut self,
        what: &'static str,
    ) -> Result<(Message, Vec<OwnedFd>), LinkError> {
        if self.early.is_some() || self.reader.since().is_some() {
            // It came out of turn, while something was sent, and whatever came with it is gone.
            return Ok((self.receive_message(what)?, Vec::new()));
        }
        let mut files = Vec::new();
        let (mut header, mut at) = ([0; HEADER_LEN], 0);
        self.drive(Wanted::Data, Patience::new(self.io_timeout), what, |socket| {
            if at == HEADER_LEN {
                return Ok(CallProgress::Done);
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut buffers = [IoSliceMut::new(&mut header[at..])];
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            match recvmsg(socket, &mut buffers, &mut ancillary, flags) {
                Ok(message) if message.bytes == 0 => Err(MemoryIoError::Closed),
                Ok(message) => {
                    at += message.bytes;
                    for part in ancillary.drain() {
                        if let RecvAncillaryMessage::ScmRights(received) = part {
                            files.extend(received);
                        }
                    }
                    // The kernel closed the files that did not fit; the caller finds out by their number.
                    if message.flags.contains(ReturnFlags::CTRUNC) || files.len() > MAX_FILES {
                        files.clear();
                    }
                    Ok(CallProgress::Moved(message.bytes))
                }
                Err(rustix::io::Errno::AGAIN) => Ok(CallProgress::WouldBlock),
                Err(rustix::io::Errno::INTR) => Ok(CallProgress::Moved(0)),
                Err(error) => Err(MemoryIoError::Socket(error.into())),
            }
        })?;
        self.reader.put_header(header);
        Ok((self.receive_message(what)?, files))
    }
}
