//! "Something about USB changed": udev's events, and the moment when some of them were lost.
//!
//! No event's content is used. Kernel events come before permissions are set, so these are udev's. The kernel drops
//! events when we are slow (a burst of 3 000 leaves about 220) and says so once, as `ENOBUFS`; libudev turns that into
//! "no event", so the error number is looked at after each of its answers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

/// USB devices, and what the host makes of them (`guards`).
const SUBSYSTEMS: [&str; 5] = ["usb", "block", "net", "input", "tty"];
/// Most events that are taken in one go, so that a storm cannot keep the loop here.
const EVENTS_PER_TURN: usize = 1024;

/// What a look at the socket told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Number of events.
    pub events: usize,
    /// The kernel dropped events before these.
    pub overrun: bool,
}

impl Seen {
    /// Whether sysfs has to be read again.
    pub const fn is_change(self) -> bool {
        self.events > 0 || self.overrun
    }
}

/// The socket of udev's events.
pub struct Monitor {
    socket: udev::MonitorSocket,
}

impl Monitor {
    /// Subscribes. Everything that happens from now on makes the socket readable, so enumerate after this.
    pub fn new() -> io::Result<Self> {
        let mut builder = udev::MonitorBuilder::new()?;
        for subsystem in SUBSYSTEMS {
            builder = builder.match_subsystem(subsystem)?;
        }
        Ok(Self { socket: builder.listen()? })
    }

    /// Takes what is there.
    pub fn drain(&self) -> Seen {
        let mut seen = Seen::default();
        for _ in 0..EVENTS_PER_TURN {
            Errno::clear();
            match self.socket.iter().next() {
                Some(_) => seen.events += 1,
                None if Errno::last() == Errno::ENOBUFS => seen.overrun = true,
                None => break,
            }
        }
        seen
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
