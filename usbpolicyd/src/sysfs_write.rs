//! Writing to sysfs, which is root's: what `usbpolicyd` asks of `usbpolicyd-sysfs`, and how.
//!
//! `usbpolicyd` has no right to write below `/sys`. The few things that need it (cutting a device off by its port, taking
//! and giving authorization) are done by a small service of root's, started by its socket when it is asked. It takes an
//! [`Order`], one of three verbs for one plugged-in device, and no path or value ever comes from the asker.
//!
//! Here are the messages and the asking side; `service` is the other side, `tree` the checks and the writes.

pub mod service;
pub mod tree;

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use common::ids::BusAddress;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::{Deserialize, Serialize};

use crate::topology::KernelName;

/// Where the service listens. Not in `/run/usbpolicyd`, which is the asker's own.
pub const SOCKET: &str = "/run/usbpolicyd-sysfs.sock";

/// How long the service may take: start, the pause of a port cycle, and a device that takes its time to leave.
const ANSWER_SECONDS: i64 = 10;
/// Room for an answer.
const ANSWER_MAX: usize = 4096;

/// What can be done to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verb {
    /// The host's drivers may have it: 1 into its `authorized`.
    Authorize,
    /// The kernel forgets its configuration and no driver has it: 0 into its `authorized`.
    Deauthorize,
    /// Its port is switched off and on, which ends every open file of it. One verb and not two: whoever dies in between,
    /// no port stays off.
    CyclePort,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// The kernel's name of the device.
    pub device: KernelName,
    /// Its bus and device number, so that what was plugged in meanwhile is left alone.
    pub address: BusAddress,
    /// What to do.
    pub verb: Verb,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it was done.
    pub ok: bool,
    /// Why not.
    pub text: String,
}

/// It was not done.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The service is not there.
    #[error(
        "taking a device back by force and `on_release = \"deauthorize\"` need the service that writes to sysfs, and \
         nobody listens at {socket}; `systemctl enable --now usbpolicyd-sysfs.socket` switches it on"
    )]
    NotThere {
        /// Its socket.
        socket: PathBuf,
    },
    /// No right to ask it.
    #[error(
        "no right to talk to usbpolicyd-sysfs at {socket}: its socket must belong to the user of usbpolicyd"
    )]
    Denied {
        /// Its socket.
        socket: PathBuf,
    },
    /// It does not answer.
    #[error("usbpolicyd-sysfs does not answer; its log tells more")]
    NoAnswer(#[source] io::Error),
    /// It refuses, or the kernel does.
    #[error("usbpolicyd-sysfs: {0}")]
    Refused(String),
}

/// Asks the service at `path` and waits for its answer.
pub fn ask(path: &Path, order: &Order) -> Result<(), AskError> {
    let no_answer = |errno: Errno| AskError::NoAnswer(errno.into());
    let socket =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).map_err(no_answer)?;
    let limit = TimeVal::seconds(ANSWER_SECONDS);
    setsockopt(&socket, sockopt::ReceiveTimeout, &limit).map_err(no_answer)?;
    setsockopt(&socket, sockopt::SendTimeout, &limit).map_err(no_answer)?;
    let address = UnixAddr::new(path).map_err(no_answer)?;
    connect(socket.as_raw_fd(), &address).map_err(|errno| match errno {
        Errno::ENOENT | Errno::ECONNREFUSED => AskError::NotThere { socket: path.to_owned() },
        Errno::EACCES | Errno::EPERM => AskError::Denied { socket: path.to_owned() },
        errno => no_answer(errno),
    })?;
    let packet = serde_json::to_vec(order).map_err(|error| AskError::NoAnswer(error.into()))?;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&packet)], &[], MsgFlags::MSG_NOSIGNAL, None)
        .map_err(no_answer)?;
    let mut buffer = [0; ANSWER_MAX];
    let length = loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Err(Errno::EINTR) => {}
            other => break other.map_err(no_answer)?,
        }
    };
    if length == 0 {
        return Err(AskError::Refused("it closed the connection without an answer".to_owned()));
    }
    match serde_json::from_slice(&buffer[..length]) {
        Ok(Answer { ok: true, .. }) => Ok(()),
        Ok(Answer { text, .. }) => Err(AskError::Refused(text)),
        Err(error) => Err(AskError::NoAnswer(error.into())),
    }
}
