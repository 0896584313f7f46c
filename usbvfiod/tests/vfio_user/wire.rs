//! A client that sends what it is told, byte for byte.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::server::Server;

pub(crate) const VERSION: u16 = 1;
pub(crate) const DMA_MAP: u16 = 2;
pub(crate) const DMA_UNMAP: u16 = 3;
pub(crate) const GET_INFO: u16 = 4;
pub(crate) const GET_REGION_INFO: u16 = 5;
pub(crate) const GET_IRQ_INFO: u16 = 7;
pub(crate) const SET_IRQS: u16 = 8;
pub(crate) const REGION_READ: u16 = 9;
pub(crate) const REGION_WRITE: u16 = 10;
pub(crate) const RESET: u16 = 13;

pub(crate) const NO_REPLY: u32 = 1 << 4;
const REPLY: u32 = 1;
const ERROR: u32 = 1 << 5;

pub(crate) const CONFIG: u32 = 7;
pub(crate) const ROM: u32 = 6;
pub(crate) const MSIX: u32 = 2;

pub(crate) const DATA_NONE: u32 = 1;
pub(crate) const DATA_BOOL: u32 = 2;
pub(crate) const DATA_EVENTFD: u32 = 4;
pub(crate) const ACTION_MASK: u32 = 8;
pub(crate) const ACTION_UNMASK: u32 = 16;
pub(crate) const ACTION_TRIGGER: u32 = 32;

/// Success with payload, or errno.
pub(crate) type Answer = Result<Vec<u8>, i32>;

pub(crate) const EINVAL: Answer = Err(libc::EINVAL);

pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
    next_id: u16,
}

impl Raw {
    /// Connected, nothing said.
    pub(crate) fn connect(server: &Server) -> Self {
        Self::connect_to(server.path())
    }

    pub(crate) fn connect_to(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        Self { stream, next_id: 0x4100 }
    }

    /// Connected and negotiated.
    pub(crate) fn negotiated(server: &Server) -> Self {
        let mut raw = Self::connect(server);
        raw.ask(VERSION, &version(0, 1, b"{}\0")).unwrap();
        raw
    }

    pub(crate) fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// Sends a message and tells its id.
    pub(crate) fn send(&mut self, command: u16, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u16 {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.send_bytes(&message(id, command, flags, payload), fds);
        id
    }

    /// Receives a reply.
    pub(crate) fn receive(&mut self) -> (u16, u16, Answer) {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).unwrap();
        let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
        let half = |at: usize| u16::from_ne_bytes(head[at..at + 2].try_into().unwrap());
        let mut payload = vec![0; word(4) as usize - 16];
        self.stream.read_exact(&mut payload).unwrap();
        let flags = word(8);
        assert_eq!(flags & 0xf, REPLY);
        let answer = if flags & ERROR == 0 { Ok(payload) } else { Err(word(12) as i32) };
        assert!(answer.is_ok() || word(4) == 16, "an error reply has no payload");
        (half(0), half(2), answer)
    }

    pub(crate) fn ask(&mut self, command: u16, payload: &[u8]) -> Answer {
        self.ask_with(command, payload, &[])
    }

    pub(crate) fn ask_with(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Answer {
        let id = self.send(command, 0, payload, fds);
        let (reply_id, reply_command, answer) = self.receive();
        assert_eq!((reply_id, reply_command), (id, command));
        answer
    }

    pub(crate) fn read(&mut self, region: u32, offset: u64, count: u32) -> Vec<u8> {
        let request = access(region, offset, count);
        let reply = self.ask(REGION_READ, &request).unwrap();
        assert_eq!(reply[..16], request);
        assert_eq!(reply.len(), 16 + count as usize);
        reply[16..].to_vec()
    }

    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let head = access(region, offset, data.len() as u32);
        let reply = self.ask(REGION_WRITE, &[&head, data].concat()).unwrap();
        assert_eq!(reply, head);
    }

    /// Something simple still works, so the stream is in step and nothing was left in it.
    pub(crate) fn assert_in_step(&mut self) {
        assert_eq!(self.read(CONFIG, 0, 4), [0x36, 0x1b, 0x0d, 0x00]);
    }

    /// The server has closed the connection.
    pub(crate) fn assert_closed(&mut self) {
        let mut byte = [0];
        assert!(matches!(self.stream.read(&mut byte), Ok(0)));
    }
}

pub(crate) fn message(id: u16, command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
    header(id, command, 16 + payload.len() as u32, flags).into_iter().chain(payload.iter().copied()).collect()
}

pub(crate) fn header(id: u16, command: u16, size: u32, flags: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&id.to_ne_bytes());
    bytes.extend_from_slice(&command.to_ne_bytes());
    bytes.extend_from_slice(&words(&[size, flags, 0]));
    bytes
}

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub(crate) fn version(major: u16, minor: u16, json: &[u8]) -> Vec<u8> {
    [&major.to_ne_bytes()[..], &minor.to_ne_bytes(), json].concat()
}

pub(crate) fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    [&offset.to_ne_bytes()[..], &words(&[region, count])].concat()
}

pub(crate) fn set_irqs(flags: u32, index: u32, start: u32, count: u32) -> Vec<u8> {
    words(&[20, flags, index, start, count])
}

/// argsz 32.
pub(crate) fn dma_map(flags: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
    [&words(&[32, flags])[..], &offset.to_ne_bytes(), &address.to_ne_bytes(), &size.to_ne_bytes()].concat()
}

/// argsz 24.
pub(crate) fn dma_unmap(flags: u32, address: u64, size: u64) -> Vec<u8> {
    [&words(&[24, flags])[..], &address.to_ne_bytes(), &size.to_ne_bytes()].concat()
}

pub(crate) fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap()
}

/// How often it was signalled since the last call.
pub(crate) fn signals(eventfd: &EventFd) -> u64 {
    eventfd.read().unwrap_or(0)
}

pub(crate) fn borrow<T: AsFd>(fds: &[T]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}

/// Guest memory as Cloud Hypervisor makes it: a memfd without seals.
pub(crate) fn memfd(len: u64) -> File {
    sealed_memfd(len, nix::fcntl::SealFlag::empty())
}

/// Guest memory as QEMU makes it: a memfd with seals.
pub(crate) fn sealed_memfd(len: u64, seals: nix::fcntl::SealFlag) -> File {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let fd: OwnedFd = memfd_create(c"guest", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(seals)).unwrap();
    file
}
