//! Events of the kernel and of udev on their netlink socket (`lib/kobject_uevent.c`, `libsystemd/sd-device/device-monitor.c`).

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, setsockopt,
    socket, sockopt,
};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The kernel, as soon as something happens.
    Kernel = 1,
    /// udev, when its rules are done with it.
    Udev = 2,
}

/// A socket that hears events.
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Hears a group from now on, with the kernel's usual buffer or one of `buffer_bytes`.
    pub fn new(group: Group, buffer_bytes: Option<usize>) -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkKObjectUEvent;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol).context("netlink")?;
        if let Some(bytes) = buffer_bytes {
            setsockopt(&socket, sockopt::RcvBuf, &bytes).context("SO_RCVBUF")?;
        }
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, group as u32)).context("bind")?;
        Ok(Self { socket })
    }

    /// The next event if there is one. `ENOBUFS`: some were lost.
    pub fn take(&self) -> nix::Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; 16 << 10];
        match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(len) => {
                buffer.truncate(len);
                Ok(Some(buffer))
            }
            Err(Errno::EAGAIN) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Waits for an event that is wanted.
    pub fn wait(&self, within: Duration, mut wanted: impl FnMut(&[u8]) -> bool) -> Result<Vec<u8>> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(event) = self.take()? {
                if wanted(&event) {
                    return Ok(event);
                }
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no such event within {within:?}");
            }
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX))?;
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The value of a variable of an event, which is text with a NUL behind each line.
pub fn value<'e>(event: &'e [u8], name: &str) -> Option<&'e str> {
    let lines = event.split(|byte| *byte == 0).filter_map(|line| std::str::from_utf8(line).ok());
    lines.filter_map(|line| line.split_once('=')).find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// What udev says of a device when told that it changed, ready to be said again.
pub fn udev_says(device: &Path) -> Result<Vec<u8>> {
    let udev = Listener::new(Group::Udev, None)?;
    let path = fs::canonicalize(device).with_context(|| device.display().to_string())?;
    fs::write(path.join("uevent"), "change")?;
    let path = path.strip_prefix("/sys")?.to_str().context("a path is text")?.to_owned();
    udev.wait(Duration::from_secs(60), |event| {
        value(event, "DEVPATH").is_some_and(|at| at == format!("/{path}"))
    })
}

/// Says an event to all who listen to udev, `count` times.
pub fn say(event: &[u8], count: usize) -> Result<()> {
    let protocol = SockProtocol::NetlinkKObjectUEvent;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    let everybody = NetlinkAddr::new(0, Group::Udev as u32);
    for _ in 0..count {
        match sendto(socket.as_raw_fd(), event, &everybody, MsgFlags::empty()) {
            // Nobody listens, or one who does has no room: the kernel tells that one.
            Ok(_) | Err(Errno::ECONNREFUSED | Errno::ENOBUFS) => {}
            Err(errno) => return Err(errno).context("sendto"),
        }
    }
    Ok(())
}
