//! Talking to the daemon: one request, then packets until `end`.

use std::io::IoSlice;
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::admin::wire::{PACKET_MAX, Reply, Request};

/// How long the daemon may take for the next packet of an answer.
const ANSWER_SECONDS: i64 = 10;

/// Where the daemon listens.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Socket {
    /// Socket of the daemon
    #[arg(long, value_name = "PATH", default_value = "/run/usbpolicyd/admin.sock", global = true)]
    socket: PathBuf,
}

/// An answer being read.
pub(super) struct Answer {
    socket: OwnedFd,
}

impl Socket {
    /// Sends a request.
    pub(super) fn ask(&self, request: &Request) -> anyhow::Result<Answer> {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        let address = UnixAddr::new(&self.socket)?;
        let path = self.socket.display();
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => {}
            Err(Errno::ENOENT | Errno::ECONNREFUSED) => {
                bail!(
                    "usbpolicyd does not run (nobody listens at {path}); start it with `systemctl start usbpolicyd`"
                )
            }
            Err(Errno::EACCES) => bail!(
                "no right to talk to usbpolicyd at {path}: become a member of group usbpolicy-view (to look), \
                 usbpolicy-operate (to attach and detach) or usbpolicy-admin"
            ),
            Err(errno) => bail!("cannot connect to {path}: {errno}"),
        }
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_SECONDS))?;
        let packet = serde_json::to_vec(request)?;
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&packet)], &[], MsgFlags::MSG_NOSIGNAL, None)
            .context("cannot send to usbpolicyd")?;
        Ok(Answer { socket })
    }

    /// Sends a request and collects the answer. An error is the daemon's refusal.
    pub(super) fn call(&self, request: &Request) -> anyhow::Result<(Vec<Reply>, Result<String, String>)> {
        let mut answer = self.ask(request)?;
        let mut replies = Vec::new();
        loop {
            match answer.next()? {
                Some(Reply::End { ok: true, text }) => return Ok((replies, Ok(text))),
                Some(Reply::End { ok: false, text }) => return Ok((replies, Err(text))),
                Some(reply) => replies.push(reply),
                None => bail!("usbpolicyd closed the connection in the middle of its answer; see its log"),
            }
        }
    }
}

impl Answer {
    /// From now on the next packet may take for ever.
    pub(super) fn wait_for_ever(&self) -> anyhow::Result<()> {
        Ok(setsockopt(&self.socket, sockopt::ReceiveTimeout, &TimeVal::seconds(0))?)
    }

    /// Waits for packets and takes all that are there; `false` when none came within `limit`.
    pub(super) fn wait_for_news(&mut self, limit: Duration) -> anyhow::Result<bool> {
        let ready = |limit: Duration| -> anyhow::Result<bool> {
            let timeout = PollTimeout::try_from(limit.as_millis()).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(count) => Ok(count > 0),
                Err(Errno::EINTR) => Ok(true),
                Err(errno) => Err(errno.into()),
            }
        };
        if !ready(limit)? {
            return Ok(false);
        }
        let mut buffer = vec![0; PACKET_MAX];
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(0) | Err(Errno::ECONNRESET) => bail!("usbpolicyd ended"),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(true),
                Err(errno) => bail!("cannot read from usbpolicyd: {errno}"),
            }
        }
    }

    /// The next packet; none when the daemon closed.
    pub(super) fn next(&mut self) -> anyhow::Result<Option<Reply>> {
        let mut buffer = vec![0; PACKET_MAX];
        let length = loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => break length,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => bail!("usbpolicyd does not answer; is it stopped?"),
                Err(Errno::ECONNRESET) => return Ok(None),
                Err(errno) => bail!("cannot read from usbpolicyd: {errno}"),
            }
        };
        if length == 0 {
            return Ok(None);
        }
        let reply = serde_json::from_slice(&buffer[..length])
            .context("usbpolicyd said something this program does not know; install both from one release")?;
        Ok(Some(reply))
    }
}
