//! The event loop: the one place of usbvfiod that performs effects.
//!
//! One thread. It reads what the VMM, usbpolicyd, the devices and the lanes have to say, hands it to the pure rooms and
//! carries out what they answer. Nothing in it waits but `epoll_wait`.

mod devices;
mod policy;
mod vmm;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signalfd::SignalFd;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tracing::info;

use crate::attached::Book;
use crate::guest_memory::GuestMemory;
use crate::pci::config::ConfigSpace;
use crate::pci::msix::Msix;
use crate::policy_link::PolicyLink;
use crate::urb::{DeviceHandle, Effect};
use crate::usb::{DeviceEvent, DeviceSet};
use crate::vfio_user::session::{Layout, Session};
use crate::vfio_user::transport::{Connection, Listener};
use crate::xhci::Controller;

/// Events taken from the kernel at once.
const EVENTS_PER_TURN: usize = 64;
/// Rounds of effects and their immediate outcomes before other inputs get their turn.
const ROUNDS_PER_TURN: usize = 32;

/// Who woke the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Signal,
    Timer,
    Lanes,
    VmmListener,
    Vmm,
    PolicyListener,
    Policy,
    Device(DeviceHandle),
}

impl Source {
    const DEVICE: u64 = 1 << 32;

    fn encode(self) -> u64 {
        match self {
            Self::Signal => 0,
            Self::Timer => 1,
            Self::Lanes => 2,
            Self::VmmListener => 3,
            Self::Vmm => 4,
            Self::PolicyListener => 5,
            Self::Policy => 6,
            Self::Device(DeviceHandle(number)) => Self::DEVICE | u64::from(number),
        }
    }

    fn decode(data: u64) -> Option<Self> {
        Some(match data {
            0 => Self::Signal,
            1 => Self::Timer,
            2 => Self::Lanes,
            3 => Self::VmmListener,
            4 => Self::Vmm,
            5 => Self::PolicyListener,
            6 => Self::Policy,
            _ if data & Self::DEVICE != 0 => {
                Self::Device(DeviceHandle(u32::try_from(data & !Self::DEVICE).ok()?))
            }
            _ => return None,
        })
    }
}

/// The VMM that is connected.
#[derive(Debug)]
struct Client {
    connection: Connection,
    session: Session,
    /// What epoll watches for.
    interest: EpollFlags,
}

/// What the daemon is made of; see [`Daemon::new`].
#[derive(Debug)]
pub struct Parts {
    /// SIGTERM and SIGINT, blocked for all threads.
    pub signals: SignalFd,
    /// Where VMMs connect; none when the one connection was handed to us.
    pub vmm_listener: Option<Listener>,
    /// A VMM's connection that was handed to us.
    pub vmm_connection: Option<Connection>,
    /// Connections of usbpolicyd.
    pub link: PolicyLink,
    /// The PCI function.
    pub config: ConfigSpace,
    /// Its interrupt vectors.
    pub msix: Msix,
    /// The controller behind BAR 0.
    pub controller: Controller,
    /// The devices.
    pub usb: DeviceSet,
    /// Sizes of regions and number of vectors.
    pub layout: Layout,
    /// Root ports for USB 2, and for USB 3.
    pub ports: (u8, u8),
}

/// The loop and all it holds.
#[derive(Debug)]
pub struct Daemon {
    epoll: Epoll,
    timer: TimerFd,
    /// For when the timer is set.
    timer_set_for: Option<Instant>,
    started: Instant,
    signals: SignalFd,
    vmm_listener: Option<Listener>,
    client: Option<Client>,
    clients_so_far: u32,
    link: PolicyLink,
    config: ConfigSpace,
    msix: Msix,
    memory: GuestMemory,
    controller: Controller,
    usb: DeviceSet,
    book: Book,
    layout: Layout,
    ports: (u8, u8),
    effects: Vec<Effect>,
    events: Vec<DeviceEvent>,
}

impl Daemon {
    /// Puts the parts together and starts to watch them.
    pub fn new(parts: Parts) -> io::Result<Self> {
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        let mut daemon = Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            timer,
            timer_set_for: None,
            started: Instant::now(),
            signals: parts.signals,
            vmm_listener: parts.vmm_listener,
            client: None,
            clients_so_far: 0,
            link: parts.link,
            config: parts.config,
            msix: parts.msix,
            memory: GuestMemory::new()?,
            controller: parts.controller,
            usb: parts.usb,
            book: Book::default(),
            layout: parts.layout,
            ports: parts.ports,
            effects: Vec::new(),
            events: Vec::new(),
        };
        daemon.watch(daemon.signals.as_fd(), Source::Signal)?;
        daemon.watch(daemon.timer.as_fd(), Source::Timer)?;
        daemon.watch(daemon.usb.lane_fd(), Source::Lanes)?;
        if let Some(listener) = &daemon.vmm_listener {
            daemon.watch(listener.as_fd(), Source::VmmListener)?;
        }
        if let Some(listener) = daemon.link.listener() {
            daemon.watch(listener, Source::PolicyListener)?;
        }
        if let Some(connection) = daemon.link.connection() {
            daemon.watch(connection, Source::Policy)?;
        }
        if let Some(connection) = parts.vmm_connection {
            daemon.serve(connection)?;
        }
        Ok(daemon)
    }

    fn watch(&self, fd: BorrowedFd<'_>, source: Source) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, source.encode()))?)
    }

    /// Runs until SIGTERM, or until the only connection that there will ever be has ended.
    pub fn run(mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS_PER_TURN];
        loop {
            let more_to_do = self.settle();
            let timeout = if more_to_do { EpollTimeout::ZERO } else { self.set_timer()? };
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => 0,
                Err(errno) => return Err(errno.into()),
            };
            for event in &events[..count] {
                match Source::decode(event.data()) {
                    Some(Source::Signal) => {
                        info!("asked to end");
                        return Ok(());
                    }
                    Some(source) => self.on_event(source, event.events())?,
                    None => {}
                }
            }
            if self.client.is_none() && self.vmm_listener.is_none() {
                info!("the VMM's connection was handed to us and has ended; nothing is left to do");
                return Ok(());
            }
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn on_event(&mut self, source: Source, flags: EpollFlags) -> io::Result<()> {
        let now = Instant::now();
        match source {
            Source::Signal => {}
            Source::Timer => {
                self.timer_set_for = None;
                // Only resets the counter; an early wake-up finds nothing due.
                let _ = self.timer.wait();
            }
            Source::Lanes => self.usb.on_lane_ready(now, &self.memory, |event| self.events.push(event)),
            Source::Device(handle) => {
                self.usb.on_device_ready(handle, flags, now, &self.memory, |event| self.events.push(event));
            }
            Source::VmmListener => self.on_vmm_listener()?,
            Source::Vmm => self.on_vmm()?,
            Source::PolicyListener => {
                self.on_policy();
                self.accept_policy()?;
            }
            Source::Policy => self.on_policy(),
        }
        Ok(())
    }

    /// Carries out what the controller wants and tells it what came of it, until nothing is left or the turn is over.
    /// True when there is more to do.
    fn settle(&mut self) -> bool {
        for _ in 0..ROUNDS_PER_TURN {
            let now = Instant::now();
            if self.usb.next_deadline().is_some_and(|deadline| deadline <= now) {
                self.usb.on_deadline(now, &self.memory, |event| self.events.push(event));
            }
            let mut events = std::mem::take(&mut self.events);
            for event in events.drain(..) {
                self.on_device_event(event);
            }
            if self.events.is_empty() {
                self.events = events;
            }
            let since_start = now.duration_since(self.started);
            if self.controller.next_deadline().is_some_and(|deadline| deadline <= since_start) {
                self.controller.tick(since_start, &self.memory, &mut self.effects);
            }
            self.controller.settle(since_start, &self.memory, &mut self.effects);
            let mut effects = std::mem::take(&mut self.effects);
            for effect in effects.drain(..) {
                let vector = self.usb.perform(effect, now, &self.memory, |event| self.events.push(event));
                if let Some(vector) = vector {
                    self.msix.signal(vector);
                }
            }
            self.effects = effects;
            if self.events.is_empty() {
                return false;
            }
        }
        true
    }

    /// Sets the timer for the next deadline, if it is another one than before. What to tell epoll.
    fn set_timer(&mut self) -> io::Result<EpollTimeout> {
        let of_controller = self.controller.next_deadline().map(|deadline| self.started + deadline);
        let next = [of_controller, self.usb.next_deadline()].into_iter().flatten().min();
        let Some(next) = next else { return Ok(EpollTimeout::NONE) };
        let wait = next.saturating_duration_since(Instant::now());
        if wait.is_zero() {
            return Ok(EpollTimeout::ZERO);
        }
        if self.timer_set_for != Some(next) {
            self.timer.set(Expiration::OneShot(wait.into()), TimerSetTimeFlags::empty())?;
            self.timer_set_for = Some(next);
        }
        Ok(EpollTimeout::NONE)
    }
}
