//! The socket between `usbpolicyd` and `usbvfiod`: SOCK_SEQPACKET, one message a packet, at most one fd with it.
//!
//! Nothing here blocks and nothing waits: a full socket is an error that the caller answers by closing ([`ChannelError::Full`]),
//! because a peer that does not read may not hold up this one. Deadlines are the caller's: it has the clock.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    UnixCredentials, accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, socket, socketpair,
    sockopt,
};
use serde::{Deserialize, Serialize};

use crate::wire::{self, PACKET_MAX, WireError};

/// Most fds the kernel puts into one message (`SCM_MAX_FD`). Room for all of them, so that a peer who sends too many
/// is told apart from one who sends one, and none of them leaks.
const SCM_MAX_FD: usize = 253;

/// Something went wrong on the channel. Except for [`ChannelError::Full`] on an idle moment there is one answer: close.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The peer closed, or died.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer does not read what we send.
    #[error("the peer does not read: its socket is full")]
    Full,
    /// The packet or its control data was longer than allowed and arrived cut.
    #[error("packet cut off: more than {PACKET_MAX} bytes or too many files")]
    Truncated,
    /// More than one file with a packet.
    #[error("{count} files with one message, at most one is allowed")]
    TooManyFiles {
        /// How many came.
        count: usize,
    },
    /// Not a message.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The kernel says no.
    #[error("{call} failed")]
    Io {
        /// System call.
        call: &'static str,
        /// Its error.
        source: io::Error,
    },
}

fn io_error(call: &'static str) -> impl Fn(Errno) -> ChannelError {
    move |errno| ChannelError::Io { call, source: errno.into() }
}

/// One end of a connection.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    buffer: Box<[u8; PACKET_MAX + 1]>,
}

impl Channel {
    fn new(socket: OwnedFd) -> Self {
        Self { socket, buffer: Box::new([0; PACKET_MAX + 1]) }
    }

    /// A connected pair, for `--policy-fd` and tests.
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (left, right) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(io_error("socketpair"))?;
        Ok((Self::new(left), Self::new(right)))
    }

    /// Connects to a listener at `path`. UNIX sockets connect at once or not at all: a full backlog is an error.
    pub fn dial(path: &Path) -> Result<Self, ChannelError> {
        let address = UnixAddr::new(path).map_err(io_error("sockaddr_un"))?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket =
            socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(io_error("socket"))?;
        connect(socket.as_raw_fd(), &address).map_err(io_error("connect"))?;
        Ok(Self::new(socket))
    }

    /// Who is at the other end: uid, gid and pid at the time of its `connect` or `listen`.
    pub fn peer(&self) -> Result<UnixCredentials, ChannelError> {
        getsockopt(&self.socket, sockopt::PeerCredentials).map_err(io_error("getsockopt(SO_PEERCRED)"))
    }

    /// Sends one message, with one file if given. Never blocks.
    pub fn send<M: Serialize>(&self, message: &M, file: Option<BorrowedFd<'_>>) -> Result<(), ChannelError> {
        let packet = wire::encode(message)?;
        let fds: [RawFd; 1] = [file.map_or(-1, |file| file.as_raw_fd())];
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if file.is_some() { &rights[..] } else { &[] };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&packet)], control, flags, None) {
            Ok(_) => Ok(()),
            Err(Errno::EAGAIN | Errno::ENOBUFS) => Err(ChannelError::Full),
            Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) => Err(ChannelError::Closed),
            Err(errno) => Err(io_error("sendmsg")(errno)),
        }
    }

    /// Takes one message, `None` when there is none now. Files that are not handed out are closed.
    pub fn receive<M: for<'de> Deserialize<'de>>(
        &mut self,
    ) -> Result<Option<(M, Option<OwnedFd>)>, ChannelError> {
        let mut control = nix::cmsg_space!([RawFd; SCM_MAX_FD]);
        let mut files = Vec::new();
        let (len, flags) = {
            let mut parts = [IoSliceMut::new(&mut self.buffer[..])];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
            let message = match recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), flags)
            {
                Ok(message) => message,
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
                Err(Errno::ECONNRESET) => return Err(ChannelError::Closed),
                Err(errno) => return Err(io_error("recvmsg")(errno)),
            };
            for item in message.cmsgs().map_err(io_error("recvmsg"))? {
                if let ControlMessageOwned::ScmRights(fds) = item {
                    files.extend(fds.into_iter().map(own));
                }
            }
            (message.bytes, message.flags)
        };
        if len == 0 {
            return Err(ChannelError::Closed);
        }
        if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) || len > PACKET_MAX {
            return Err(ChannelError::Truncated);
        }
        if files.len() > 1 {
            return Err(ChannelError::TooManyFiles { count: files.len() });
        }
        Ok(Some((wire::decode(&self.buffer[..len])?, files.pop())))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.socket
    }
}

impl TryFrom<OwnedFd> for Channel {
    type Error = ChannelError;

    /// Takes a connected SEQPACKET socket that was handed to us.
    fn try_from(socket: OwnedFd) -> Result<Self, ChannelError> {
        check_type(&socket)?;
        set_nonblocking(&socket)?;
        Ok(Self::new(socket))
    }
}

/// The listening end.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Binds `path` with exactly `mode`. A socket file that nobody listens on is replaced; one that somebody listens on
    /// is an error (`EADDRINUSE`), so is a path that is something else (`EEXIST`).
    ///
    /// The mode is set by the umask during `bind`, so at no moment more than `mode` is allowed. Call it while the
    /// process has one thread: the umask belongs to the process.
    pub fn bind(path: &Path, mode: u32) -> Result<Self, ChannelError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket =
            socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(io_error("socket"))?;
        bind_replacing_stale(&socket, path, mode, SockType::SeqPacket)?;
        listen(&socket, Backlog::new(8).map_err(io_error("listen"))?).map_err(io_error("listen"))?;
        Ok(Self { socket })
    }

    /// Takes the next connection, `None` when there is none now.
    pub fn accept(&self) -> Result<Option<Channel>, ChannelError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        match accept4(self.socket.as_raw_fd(), flags) {
            Ok(raw) => Ok(Some(Channel::new(own(raw)))),
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => Ok(None),
            Err(errno) => Err(io_error("accept4")(errno)),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl TryFrom<OwnedFd> for Listener {
    type Error = ChannelError;

    /// Takes a listening SEQPACKET socket that was handed to us (`--policy-fd`, socket activation).
    fn try_from(socket: OwnedFd) -> Result<Self, ChannelError> {
        check_type(&socket)?;
        if !getsockopt(&socket, sockopt::AcceptConn).map_err(io_error("getsockopt(SO_ACCEPTCONN)"))? {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "the socket does not listen");
            return Err(ChannelError::Io { call: "getsockopt(SO_ACCEPTCONN)", source });
        }
        set_nonblocking(&socket)?;
        Ok(Self { socket })
    }
}

fn check_type(socket: &OwnedFd) -> Result<(), ChannelError> {
    match getsockopt(socket, sockopt::SockType).map_err(io_error("getsockopt(SO_TYPE)"))? {
        SockType::SeqPacket => Ok(()),
        other => {
            let text = format!("the socket is of type {other:?}, not SeqPacket");
            let source = io::Error::new(io::ErrorKind::InvalidInput, text);
            Err(ChannelError::Io { call: "getsockopt(SO_TYPE)", source })
        }
    }
}

fn set_nonblocking(socket: &OwnedFd) -> Result<(), ChannelError> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(io_error("fcntl(F_SETFL)"))?;
    Ok(())
}

/// Binds `socket` to `path` with exactly `mode`; see [`Listener::bind`]. `kind` is the socket's type, needed to find out
/// whether somebody listens there.
pub fn bind_replacing_stale(
    socket: &OwnedFd,
    path: &Path,
    mode: u32,
    kind: SockType,
) -> Result<(), ChannelError> {
    use nix::sys::stat::{Mode, umask};
    let address = UnixAddr::new(path).map_err(io_error("sockaddr_un"))?;
    let bind_with_mode = || {
        let old = umask(Mode::from_bits_truncate(!mode & 0o777));
        let result = bind(socket.as_raw_fd(), &address);
        umask(old);
        result
    };
    match bind_with_mode() {
        Err(Errno::EADDRINUSE) if is_stale(path, &address, kind)? => {
            std::fs::remove_file(path).map_err(|source| ChannelError::Io { call: "unlink", source })?;
            bind_with_mode().map_err(io_error("bind"))
        }
        result => result.map_err(io_error("bind")),
    }
}

/// Whether `path` is a socket that nobody listens on.
fn is_stale(path: &Path, address: &UnixAddr, kind: SockType) -> Result<bool, ChannelError> {
    use std::os::unix::fs::FileTypeExt;
    let meta =
        std::fs::symlink_metadata(path).map_err(|source| ChannelError::Io { call: "lstat", source })?;
    if !meta.file_type().is_socket() {
        return Err(ChannelError::Io { call: "bind", source: io::ErrorKind::AlreadyExists.into() });
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, kind, flags, None).map_err(io_error("socket"))?;
    Ok(connect(probe.as_raw_fd(), address) == Err(Errno::ECONNREFUSED))
}

#[expect(unsafe_code, reason = "nix hands out received and accepted fds as numbers")]
fn own(raw: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this fd for us (recvmsg, accept4) and nobody else has seen its number.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use nix::sys::socket::send;

    use super::*;
    use crate::ids::DeviceId;
    use crate::wire::{FromInstance, ToInstance};

    fn send_raw(channel: &Channel, bytes: &[u8], fds: &[RawFd]) {
        let control = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[] } else { &control[..] };
        let flags = MsgFlags::MSG_DONTWAIT;
        sendmsg::<()>(channel.socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None).unwrap();
    }

    #[test]
    fn a_message_arrives_with_its_file() {
        let (left, mut right) = Channel::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        left.send(&ToInstance::Ping { nonce: 5 }, Some(file.as_fd())).unwrap();
        let (message, received) = right.receive::<ToInstance>().unwrap().unwrap();
        assert_eq!(message, ToInstance::Ping { nonce: 5 });
        let flags = nix::fcntl::fcntl(received.unwrap(), nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }

    #[test]
    fn nothing_to_read_is_no_error() {
        let (_left, mut right) = Channel::pair().unwrap();
        assert!(right.receive::<ToInstance>().unwrap().is_none());
    }

    #[test]
    fn a_closed_peer_is_told() {
        let (left, mut right) = Channel::pair().unwrap();
        drop(left);
        assert!(matches!(right.receive::<ToInstance>(), Err(ChannelError::Closed)));
        let detached = FromInstance::Detached { id: DeviceId(1) };
        assert!(matches!(right.send(&detached, None), Err(ChannelError::Closed)));
    }

    #[test]
    fn two_files_are_refused_and_closed() {
        let (left, mut right) = Channel::pair().unwrap();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let raw = writer.as_raw_fd();
        send_raw(&left, b"{}", &[raw, raw]);
        drop(writer);
        let error = right.receive::<ToInstance>().unwrap_err();
        assert!(matches!(error, ChannelError::TooManyFiles { count: 2 }));
        // All write ends are closed: the pipe is at its end.
        assert_eq!(nix::unistd::read(&reader, &mut [0]), Ok(0));
    }

    #[test]
    fn an_over_long_packet_is_refused() {
        let (left, mut right) = Channel::pair().unwrap();
        send_raw(&left, &[b' '; PACKET_MAX + 1], &[]);
        assert!(matches!(right.receive::<ToInstance>(), Err(ChannelError::Truncated)));
    }

    #[test]
    fn an_empty_packet_ends_the_connection() {
        let (left, mut right) = Channel::pair().unwrap();
        send(left.socket.as_raw_fd(), &[], MsgFlags::empty()).unwrap();
        assert!(matches!(right.receive::<ToInstance>(), Err(ChannelError::Closed)));
    }

    #[test]
    fn a_peer_that_does_not_read_fills_up_and_does_not_block() {
        let (left, _right) = Channel::pair().unwrap();
        let full = (0..100_000).find_map(|nonce| left.send(&ToInstance::Ping { nonce }, None).err());
        assert!(matches!(full, Some(ChannelError::Full)));
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.sock");
        drop(Listener::bind(&path, 0o660).unwrap());
        let live = Listener::bind(&path, 0o660).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        let taken = Listener::bind(&path, 0o660).unwrap_err();
        assert!(
            matches!(taken, ChannelError::Io { call: "bind", source } if source.kind() == io::ErrorKind::AddrInUse)
        );
        drop(live);
    }

    #[test]
    fn a_path_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.sock");
        std::fs::write(&path, "precious").unwrap();
        let error = Listener::bind(&path, 0o660).unwrap_err();
        assert!(
            matches!(error, ChannelError::Io { call: "bind", source } if source.kind() == io::ErrorKind::AlreadyExists)
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_dialled_listener_sees_who_called() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.sock");
        let listener = Listener::bind(&path, 0o660).unwrap();
        assert!(listener.accept().unwrap().is_none());
        let caller = Channel::dial(&path).unwrap();
        let accepted = listener.accept().unwrap().unwrap();
        assert_eq!(accepted.peer().unwrap().uid(), nix::unistd::getuid().as_raw());
        assert_eq!(caller.peer().unwrap().uid(), nix::unistd::getuid().as_raw());
    }

    #[test]
    fn a_stream_socket_is_refused_as_a_channel() {
        let (stream, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Channel::try_from(OwnedFd::from(stream)).is_err());
    }
}
