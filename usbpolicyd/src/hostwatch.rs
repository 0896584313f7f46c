//! Word that the host uses its devices differently now: mounts, swaps, routes. Only that something changed; `guards`
//! looks what.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// `RTMGRP_LINK`, `RTMGRP_IPV4_ROUTE` and `RTMGRP_IPV6_ROUTE` of `linux/rtnetlink.h`.
const ROUTE_GROUPS: u32 = 0x1 | 0x40 | 0x400;
/// Most messages that are taken in one turn.
const MESSAGES_PER_TURN: usize = 256;

/// The files that tell. Each one that cannot be opened is left out: the 60 s timer makes up for it.
#[derive(Debug)]
pub struct HostWatch {
    lists: Vec<File>,
    routes: Option<OwnedFd>,
}

impl HostWatch {
    /// Opens them below `proc`.
    pub fn new(proc: &Path) -> Self {
        let mounts =
            File::open(proc.join("1/mountinfo")).or_else(|_| File::open(proc.join("self/mountinfo")));
        let swaps = File::open(proc.join("swaps"));
        let routes =
            routes().inspect_err(|errno| tracing::warn!(%errno, "cannot listen to changes of routes"));
        Self { lists: [mounts, swaps].into_iter().flatten().collect(), routes: routes.ok() }
    }

    /// What to poll, and for what.
    pub fn sockets(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        // The kernel says POLLPRI when the list changed since the last poll (fs/proc_namespace.c mounts_poll).
        let lists = self.lists.iter().map(|file| (file.as_fd(), PollFlags::POLLPRI));
        lists.chain(self.routes.iter().map(|socket| (socket.as_fd(), PollFlags::POLLIN)))
    }

    /// Forgets what the kernel said: that it said something is all that counts.
    pub fn drain(&self) {
        let Some(socket) = &self.routes else { return };
        let mut buffer = [0; 8192];
        for _ in 0..MESSAGES_PER_TURN {
            match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                // Lost messages are news like any other.
                Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }
}

fn routes() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, ROUTE_GROUPS))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quiet_host_has_no_news_and_draining_it_returns() {
        let watch = HostWatch::new(Path::new("/proc"));
        watch.drain();
        assert!(watch.sockets().count() >= 1);
    }
}
