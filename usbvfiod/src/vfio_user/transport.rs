//! The shell around [`super::session`]: a listening UNIX stream socket and its connections, none of which ever blocks.
//!
//! It does not decide which of several clients is served; the daemon accepts a second one and drops it at once, because
//! a client that is left in the backlog hangs its VMM.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use rustix::process::{PidfdFlags, PidfdGetfdFlags};

use super::message::MAX_FDS;
use super::session::Session;

/// Waiting clients; all but one are accepted and dropped.
const BACKLOG: i32 = 4;

/// The socket at the given path cannot be ours.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody answers there.
    #[error("{path} is served by another process; stop that one or choose another --socket-path")]
    Live {
        /// The path.
        path: PathBuf,
    },
    /// Something lies there that we will not remove.
    #[error("{path} exists and is not a socket; remove it or choose another --socket-path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The kernel says no.
    #[error("cannot listen on {path}")]
    Bind {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The inherited descriptor is of no use.
    #[error("file descriptor {fd} is not a UNIX stream socket that was handed to this process")]
    Inherited {
        /// Its number.
        fd: RawFd,
        /// Why.
        source: io::Error,
    },
}

/// A socket that clients connect to.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

/// What a descriptor given by number turned out to be.
#[derive(Debug)]
pub enum Inherited {
    /// It listens (socket activation).
    Listener(Listener),
    /// It is a connection already; when it ends there will be no other.
    Connection(Connection),
}

impl Listener {
    /// Binds `path`. A socket file that nobody serves any more is replaced; a live one, or a file that is no socket,
    /// is left alone.
    ///
    /// Two processes that start at the same instant on a stale path may both find it stale; the second `bind` then
    /// fails, unless it removed the other's socket in the moment between test and removal, which is checked by inode.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let failed = |source: Errno| ListenError::Bind { path: path.to_owned(), source: source.into() };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let socket = stream_socket().map_err(failed)?;
        match net::bind(&socket, &address) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(path, &address)?;
                net::bind(&socket, &address).map_err(failed)?;
            }
            other => other.map_err(failed)?,
        }
        net::listen(&socket, BACKLOG).map_err(failed)?;
        Ok(Self { socket })
    }

    /// The next client, if one waits.
    pub fn accept(&self) -> io::Result<Option<Connection>> {
        match net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => Ok(Some(Connection::new(socket))),
            Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Takes over a socket that the parent process left open as descriptor `number` (`--fd`, socket activation). The copy
/// we work on closes on exec and does not block.
pub fn inherit(number: RawFd) -> Result<Inherited, ListenError> {
    let failed = |source: Errno| ListenError::Inherited { fd: number, source: source.into() };
    let fd = inherit_fd(number).map_err(|source| ListenError::Inherited { fd: number, source })?;
    if net::sockopt::socket_domain(&fd).map_err(failed)? != AddressFamily::UNIX
        || net::sockopt::socket_type(&fd).map_err(failed)? != SocketType::STREAM
    {
        return Err(failed(Errno::PROTOTYPE));
    }
    rustix::io::ioctl_fionbio(&fd, true).map_err(failed)?;
    Ok(match net::sockopt::socket_acceptconn(&fd).map_err(failed)? {
        true => Inherited::Listener(Listener { socket: fd }),
        false => Inherited::Connection(Connection::new(fd)),
    })
}

/// A copy of the descriptor with this number, whoever opened it. `pidfd_getfd` on ourselves, because there is no other
/// way from a number to an [`OwnedFd`] that is safe when the number is wrong. Needs Linux 5.6, before the sandbox.
pub fn inherit_fd(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(Errno::BADF.into());
    }
    let ourselves = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    Ok(rustix::process::pidfd_getfd(ourselves, number, PidfdGetfdFlags::empty())?)
}

fn stream_socket() -> Result<OwnedFd, Errno> {
    net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
}

fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let failed = |source: io::Error| ListenError::Bind { path: path.to_owned(), source };
    let before = path.symlink_metadata().map_err(failed)?;
    if !before.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    let probe = stream_socket().map_err(|errno| failed(errno.into()))?;
    match net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        // Also a full backlog: somebody listens.
        Ok(()) | Err(Errno::AGAIN) => return Err(ListenError::Live { path: path.to_owned() }),
        Err(errno) => return Err(failed(errno.into())),
    }
    let now = path.symlink_metadata().map_err(failed)?;
    if (now.dev(), now.ino()) != (before.dev(), before.ino()) {
        return Err(ListenError::Live { path: path.to_owned() });
    }
    std::fs::remove_file(path).map_err(failed)
}

/// What came of [`Connection::receive`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Some bytes, and perhaps there are more.
    Bytes,
    /// Some bytes, and that was all at that moment: no need to ask again before epoll says so.
    Last,
    /// Nothing is there, or the session wants nothing now.
    Nothing,
    /// The client is gone.
    EndOfStream,
}

/// A client.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
}

impl Connection {
    fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Whether the client has closed its end, also while bytes of it are still unread.
    ///
    /// To be asked before a second client is turned away: when a VM reboots, Cloud Hypervisor closes and connects in one
    /// breath, both are ready in the same turn of the loop, and it ends when the new connection is refused.
    pub fn has_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Reads once. Descriptors close on exec.
    pub fn receive(&mut self, session: &mut Session) -> io::Result<Received> {
        if !session.wants_to_receive() {
            return Ok(if self.has_hung_up() { Received::EndOfStream } else { Received::Nothing });
        }
        let inbox = session.inbox();
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let spare = inbox.spare();
        let room = spare.len();
        let received = match net::recvmsg(&self.socket, &mut [IoSliceMut::new(spare)], &mut control, flags) {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
            Err(Errno::CONNRESET) => return Ok(Received::EndOfStream),
            Err(errno) => return Err(errno.into()),
        };
        if received.bytes == 0 {
            return Ok(Received::EndOfStream);
        }
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        // The kernel also ends a read behind descriptors.
        let is_last = received.bytes < room && fds.is_empty();
        inbox.received(received.bytes, fds, received.flags.contains(ReturnFlags::CTRUNC));
        Ok(if is_last { Received::Last } else { Received::Bytes })
    }

    /// Sends what there is, one reply at a time, until all is sent or the socket is full.
    pub fn send(&mut self, session: &mut Session) -> io::Result<()> {
        let outbox = session.outbox();
        while !outbox.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let bytes = [IoSlice::new(outbox.next())];
            match net::sendmsg(&self.socket, &bytes, &mut SendAncillaryBuffer::default(), flags) {
                Ok(len) => outbox.sent(len),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<UnixStream> for Connection {
    /// Takes any stream; it may block otherwise, we never let it.
    fn from(stream: UnixStream) -> Self {
        Self::new(stream.into())
    }
}

#[cfg(test)]
mod tests;
