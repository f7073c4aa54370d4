//! An example of a page-fault handler for `godwit restore --uffd SOCKET`: fills each page when it is needed.
//!
//! `fault-handler MEMORY SOCKET`, where MEMORY is the file of that name in the snapshot. It says `listening`, serves one
//! machine until that hangs up, and says how many pages it filled and how many were given up.

#[path = "userfault.rs"]
mod userfault;

use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;

use userfault::HandlerEvent;

fn main() -> Result<()> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let [memory, socket] = words.as_slice() else {
        bail!("expected MEMORY SOCKET");
    };
    let memory = File::open(memory).context("memory file")?;
    let listener = UnixListener::bind(socket).context("socket")?;
    println!("listening");
    let (stream, _) = listener.accept()?;
    let mut handler = PageFaultServer::receive_mappings(&stream, memory)?;
    handler.serve(stream)?;
    let PageFaultServer { filled, given_up, .. } = handler;
    println!("filled {filled}, given up {given_up}");
    Ok(())
}

/// A region of guest memory in the other process.
struct ServedRegion {
    start: u64,
    size: u64,
    /// Where its content is in the memory file.
    offset: u64,
    page_size: u64,
    /// For each page whether the guest gave it up: then it is zero, whatever the file has.
    is_given_up: Vec<bool>,
}

struct PageFaultServer {
    memory: File,
    descriptor: OwnedFd,
    regions: Vec<ServedRegion>,
    /// Faults that could not be resolved yet, as events have to be read first.
    waiting: Vec<u64>,
    filled: u64,
    given_up: u64,
}

impl PageFaultServer {
    /// Reads the one message that the VMM sends.
    fn receive_mappings(stream: &UnixStream, memory: File) -> Result<Self> {
        let mut text = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            stream,
            &mut [IoSliceMut::new(&mut text)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        let mappings: Vec<Value> = serde_json::from_slice(&text[..got.bytes]).context("mappings")?;
        let region = |mapping: &Value| {
            let number = |name: &str| {
                mapping[name]
                    .as_u64()
                    .with_context(|| format!("{name} in {mapping}"))
            };
            let (size, page_size) = (number("size")?, number("page_size")?);
            Ok(ServedRegion {
                start: number("base_host_virt_addr")?,
                size,
                offset: number("offset")?,
                page_size,
                is_given_up: vec![false; (size / page_size) as usize],
            })
        };
        Ok(Self {
            memory,
            descriptor: descriptor.context("a descriptor with the mappings")?,
            regions: mappings.iter().map(region).collect::<Result<_>>()?,
            waiting: Vec::new(),
            filled: 0,
            given_up: 0,
        })
    }

    /// Serves faults until the VMM hangs up.
    fn serve(&mut self, mut stream: UnixStream) -> Result<()> {
        loop {
            let mut sources = [
                PollFd::new(&self.descriptor, PollFlags::IN),
                PollFd::new(&stream, PollFlags::IN),
            ];
            let soon = Timespec {
                tv_sec: 0,
                tv_nsec: 1_000_000,
            };
            poll(&mut sources, Some(&soon).filter(|_| !self.waiting.is_empty()))?;
            let [events, hung_up] = sources.map(|source| !source.revents().is_empty());
            if hung_up && stream.read(&mut [0])? == 0 {
                return Ok(());
            }
            if events || !self.waiting.is_empty() {
                self.handle_events()?;
            }
        }
    }

    /// Reads all events, then fills the pages that were asked for.
    fn handle_events(&mut self) -> Result<()> {
        while let Some(event) = userfault::next(&self.descriptor)? {
            match event {
                HandlerEvent::Fault { address } => self.waiting.push(address),
                HandlerEvent::Remove { start, end } => self.mark_given_up(start, end),
            }
        }
        for address in std::mem::take(&mut self.waiting) {
            if !self.fill(address)? {
                self.waiting.push(address);
            }
        }
        Ok(())
    }

    fn mark_given_up(&mut self, start: u64, end: u64) {
        for region in &mut self.regions {
            let pages = (region.start..region.start + region.size).step_by(region.page_size as usize);
            for (page, is_given_up) in pages.zip(&mut region.is_given_up) {
                if (start..end).contains(&page) {
                    *is_given_up = true;
                    self.given_up += 1;
                }
            }
        }
    }

    /// Fills the page of an address; `false` where the kernel wants events to be read first.
    fn fill(&mut self, address: u64) -> Result<bool> {
        let region = self
            .regions
            .iter()
            .find(|region| (region.start..region.start + region.size).contains(&address));
        let region = region.with_context(|| format!("a fault outside guest memory, at {address:#x}"))?;
        let page = (address - region.start) / region.page_size;
        let mut content = vec![0; region.page_size as usize];
        if !region.is_given_up[page as usize] {
            self.memory
                .read_exact_at(&mut content, region.offset + page * region.page_size)?;
        }
        let to = region.start + page * region.page_size;
        match userfault::copy(&self.descriptor, to, &content) {
            Ok(()) => self.filled += 1,
            // Two threads asked for one page.
            Err(Errno::EXIST) => userfault::wake(&self.descriptor, to, region.page_size)?,
            Err(Errno::AGAIN) => return Ok(false),
            // The VMM is ending.
            Err(Errno::SRCH) => {}
            Err(errno) => return Err(io::Error::from(errno)).context("UFFDIO_COPY"),
        }
        Ok(true)
    }
}
