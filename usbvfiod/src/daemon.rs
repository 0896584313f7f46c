//! The event loop: the one place of usbvfiod that performs effects.
//!
//! One thread. It reads what the VMM, usbpolicyd, the devices and the lanes have to say, hands it to the pure rooms and
//! carries out what they answer. Nothing in it waits but `epoll_wait`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use common::wire::{self, Attach, FromInstance, PROTOCOL_VERSION, RefusedCode, Stats, cut_text};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signalfd::SignalFd;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tracing::{debug, info, warn};

use crate::attached::{Book, Farewell, State};
use crate::guest_memory::GuestMemory;
use crate::pci::config::ConfigSpace;
use crate::pci::{self, msix::Msix};
use crate::policy_link::{PolicyLink, Request as PolicyRequest};
use crate::urb::{DeviceHandle, Effect};
use crate::usb::{DeviceEvent, DeviceInfo, DeviceSet, Refused};
use crate::vfio_user::message::{DmaUnmap, Region};
use crate::vfio_user::session::{Layout, Request, Session};
use crate::vfio_user::transport::{Connection, Listener, Received};
use crate::xhci::{AttachError, AttachOptions, Controller, PortNumber, ResetPolicy};

/// Events taken from the kernel at once.
const EVENTS_PER_TURN: usize = 64;
/// Rounds of effects and their immediate outcomes before other inputs get their turn.
const ROUNDS_PER_TURN: usize = 32;
/// Most times the socket of the VMM is read before other inputs get their turn.
const READS_PER_TURN: usize = 8;

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

// The VMM.
impl Daemon {
    fn on_vmm_listener(&mut self) -> io::Result<()> {
        // The end of the old connection may be waiting behind the new one.
        self.on_vmm()?;
        let Some(listener) = &self.vmm_listener else { return Ok(()) };
        match listener.accept() {
            Ok(Some(connection)) if self.client.is_none() => self.serve(connection),
            Ok(Some(_)) => {
                warn!("a second VMM connected and was turned away: one usbvfiod serves one VM");
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(error) => {
                warn!(%error, "cannot accept the VMM's connection");
                Ok(())
            }
        }
    }

    fn serve(&mut self, connection: Connection) -> io::Result<()> {
        self.clients_so_far = self.clients_so_far.wrapping_add(1);
        self.watch(connection.as_fd(), Source::Vmm)?;
        let session = Session::new(self.layout, self.clients_so_far);
        self.client = Some(Client { connection, session, interest: EpollFlags::EPOLLIN });
        info!("VMM connected");
        Ok(())
    }

    fn on_vmm(&mut self) -> io::Result<()> {
        for _ in 0..READS_PER_TURN {
            let Some(client) = &mut self.client else { return Ok(()) };
            let received = client.connection.receive(&mut client.session);
            self.on_requests();
            let Some(client) = &mut self.client else { return Ok(()) };
            let sent = client.connection.send(&mut client.session);
            let is_over = client.session.is_over();
            match (received, sent) {
                (Ok(Received::EndOfStream), _) => {
                    self.drop_client("it closed the connection");
                    return Ok(());
                }
                (Err(error), _) | (_, Err(error)) => {
                    self.drop_client(&error.to_string());
                    return Ok(());
                }
                _ if is_over => {
                    self.drop_client("it broke the protocol while negotiating");
                    return Ok(());
                }
                (Ok(Received::Nothing), Ok(())) => break,
                (Ok(Received::Bytes), Ok(())) => {}
            }
        }
        self.watch_client()
    }

    /// Watches for what the session wants now.
    fn watch_client(&mut self) -> io::Result<()> {
        let Some(client) = &mut self.client else { return Ok(()) };
        let mut interest = EpollFlags::empty();
        interest.set(EpollFlags::EPOLLIN, client.session.wants_to_receive());
        interest.set(EpollFlags::EPOLLOUT, client.session.wants_to_send());
        if interest != client.interest {
            self.epoll.modify(&client.connection, &mut EpollEvent::new(interest, Source::Vmm.encode()))?;
            client.interest = interest;
        }
        Ok(())
    }

    fn on_requests(&mut self) {
        let now = self.now();
        let Some(client) = &mut self.client else { return };
        while let Some(request) = client.session.next_request() {
            match request {
                Request::RegionRead { region, offset, data } => match region {
                    Region::Bar(0) => self.controller.read(now, offset, data),
                    Region::Bar(pci::MSIX_BAR) => self.msix.read(offset, data),
                    Region::Config => self.config.read(offset, data),
                    Region::Bar(_) | Region::Rom | Region::Vga => {}
                },
                Request::RegionWrite { region, offset, data } => match region {
                    Region::Bar(0) => {
                        self.controller.write(now, &self.memory, offset, data, &mut self.effects);
                    }
                    Region::Bar(pci::MSIX_BAR) => self.msix.write(offset, data),
                    Region::Config => self.config.write(offset, data),
                    Region::Bar(_) | Region::Rom | Region::Vga => {}
                },
                Request::SetIrqs(change) => self.msix.apply(change),
                Request::DmaMap { token, map, file } => {
                    let result = self.memory.map(&map, file);
                    if let Err(errno) = result {
                        warn!(?map, %errno, "the VMM's memory cannot be mapped; DMA to it will fail");
                    }
                    client.session.finish(token, result);
                }
                // No quiet has to be waited for: guest memory is touched by this thread alone, in copies that are
                // over. A transfer that ends later finds the range gone.
                Request::DmaUnmap { token, range } => {
                    self.memory.unmap(range);
                    client.session.finish(token, Ok(()));
                }
                Request::Reset { token } => {
                    self.controller.reset(now, &mut self.effects);
                    self.config.reset();
                    self.msix.reset();
                    client.session.finish(token, Ok(()));
                }
            }
        }
    }

    fn drop_client(&mut self, reason: &str) {
        let Some(client) = self.client.take() else { return };
        info!(reason, "VMM gone; its devices stay and wait for the next one");
        if let Err(error) = self.epoll.delete(&client.connection) {
            debug!(%error, "the connection was not watched");
        }
        // The effects are carried out by the next `settle`; by then memory is gone, and so are the transfers' buffers.
        self.controller.reset(self.started.elapsed(), &mut self.effects);
        self.config.reset();
        self.msix.disconnect();
        self.memory.unmap(DmaUnmap::All);
    }
}

// Devices.
impl Daemon {
    fn on_device_event(&mut self, event: DeviceEvent) {
        let now = self.now();
        match event {
            DeviceEvent::Completed { completion, .. } => {
                self.controller.complete(now, &self.memory, completion, &mut self.effects);
            }
            DeviceEvent::Operated { id, result, .. } => {
                self.controller.operation_done(now, &self.memory, id, result, &mut self.effects);
            }
            DeviceEvent::Attached { device, info } => self.on_opened(device, &info),
            DeviceEvent::Refused { device, reason } => {
                if let Some(entry) = self.book.close(device) {
                    let (code, text) = explain(&reason);
                    self.refuse(entry.id, code, text);
                }
            }
            DeviceEvent::Gone { device } => {
                self.leave(device, Farewell::Gone("the device is gone".to_owned()))
            }
            DeviceEvent::Detached { device } => {
                let Some(entry) = self.book.close(device) else { return };
                let id = entry.id;
                match entry.state {
                    State::Leaving(Farewell::Detached) => self.link.send(&FromInstance::Detached { id }),
                    State::Leaving(Farewell::Gone(text)) => self.link.send(&FromInstance::Gone { id, text }),
                    _ => {}
                }
            }
        }
    }

    /// A lane has opened and claimed a device: give it a port.
    fn on_opened(&mut self, device: DeviceHandle, info: &DeviceInfo) {
        let Some(entry) = self.book.get(device) else { return self.usb.detach(device) };
        let State::Opening(attach) = &entry.state else { return };
        let (id, attach) = (entry.id, attach.clone());
        let result = self.plug(device, &attach, info);
        match result {
            Ok(port) => {
                info!(device = %id, port, ids = %info.ids, path = %info.path, speed = %info.speed, "device attached");
                if let Some(entry) = self.book.get_mut(device) {
                    entry.state = State::Attached { port, address: info.address, path: info.path.clone() };
                }
                self.link.send(&FromInstance::Attached { id, port });
            }
            Err((code, text)) => {
                self.refuse(id, code, text);
                self.leave(device, Farewell::Nothing);
            }
        }
    }

    fn plug(
        &mut self,
        device: DeviceHandle,
        attach: &Attach,
        info: &DeviceInfo,
    ) -> Result<u8, (RefusedCode, String)> {
        if info.path != attach.path || info.ids != attach.ids {
            let text = format!(
                "the file is {} at port {}, the message says {} at port {}; usbpolicyd has to look again",
                info.ids, info.path, attach.ids, attach.path
            );
            return Err((RefusedCode::WrongDevice, text));
        }
        let Some(fd) = self.usb.fd(device) else {
            return Err((RefusedCode::Unusable, "the device went while it was opened".to_owned()));
        };
        let event = EpollEvent::new(DeviceSet::INTEREST, Source::Device(device).encode());
        self.epoll
            .add(fd, event)
            .map_err(|errno| (RefusedCode::NoResources, format!("epoll_ctl: {errno}")))?;
        let reset = match attach.reset {
            wire::ResetPolicy::Never => ResetPolicy::Never,
            wire::ResetPolicy::FirstFree => ResetPolicy::FirstFree,
            wire::ResetPolicy::Always => ResetPolicy::Always,
        };
        // The transport knows by itself which configuration needs no call.
        let options = AttachOptions {
            reset,
            configuration: None,
            host_streams: info.speed.is_usb3() && !info.uas_hidden,
        };
        let port =
            self.controller.attach(self.now(), &self.memory, device, info.speed, options, &mut self.effects);
        port.map(PortNumber::get).map_err(|error: AttachError| (RefusedCode::NoPort, error.to_string()))
    }

    /// Takes a device out of everything. Its file is closed by a lane; then usbpolicyd is told.
    fn leave(&mut self, device: DeviceHandle, farewell: Farewell) {
        let Some(entry) = self.book.get_mut(device) else { return };
        if let State::Leaving(before) = &mut entry.state {
            // It was leaving already; an answer that is waited for outranks one that is not.
            if farewell == Farewell::Detached {
                *before = farewell;
            }
            return;
        }
        info!(device = %entry.id, reason = ?farewell, "device detached");
        entry.state = State::Leaving(farewell);
        if let Some(fd) = self.usb.fd(device)
            && let Err(error) = self.epoll.delete(fd)
        {
            debug!(%error, "the device was not watched");
        }
        self.controller.detach(self.started.elapsed(), &self.memory, device, &mut self.effects);
        self.usb.detach(device);
    }
}

// usbpolicyd.
impl Daemon {
    fn accept_policy(&mut self) -> io::Result<()> {
        if self.link.accept()
            && let Some(connection) = self.link.connection()
        {
            self.watch(connection, Source::Policy)?;
        }
        Ok(())
    }

    fn on_policy(&mut self) {
        for request in self.link.receive() {
            match request {
                PolicyRequest::Hello => {
                    let (usb2_ports, usb3_ports) = self.ports;
                    let vmm_connected = self.client.is_some();
                    let version = PROTOCOL_VERSION;
                    self.link.send(&FromInstance::Hello { version, usb2_ports, usb3_ports, vmm_connected });
                }
                PolicyRequest::Attach(attach, file) => self.on_attach(attach, file),
                PolicyRequest::Detach(id) => match self.book.handle_of(id) {
                    Some(device) => self.leave(device, Farewell::Detached),
                    None => self.link.send(&FromInstance::Detached { id }),
                },
                PolicyRequest::List { after } => {
                    let list = self.book.list(after);
                    self.link.send(&list);
                }
                PolicyRequest::Ping { nonce } => {
                    let stats = self.stats();
                    self.link.pong(nonce, stats);
                }
            }
        }
    }

    fn on_attach(&mut self, attach: Attach, file: std::os::fd::OwnedFd) {
        let id = attach.id;
        // As many lanes as ports: a device more could only wait for a lane and then find no port.
        if self.book.len() >= usize::from(self.ports.0) + usize::from(self.ports.1) {
            let text =
                "all ports of this controller are taken; detach a device or start usbvfiod with more --ports";
            return self.refuse(id, RefusedCode::NoPort, text.to_owned());
        }
        let handover = crate::usb::Handover { address: attach.address, configuration: attach.configuration };
        match self.book.open(attach) {
            Some(device) => self.usb.attach(device, file, handover),
            None => self.refuse(id, RefusedCode::DuplicateId, format!("device {id} is here already")),
        }
    }

    fn refuse(&mut self, id: common::ids::DeviceId, code: RefusedCode, text: String) {
        warn!(device = %id, ?code, reason = text, "device refused");
        self.link.send(&FromInstance::Refused { id, code, text: cut_text(text) });
    }

    fn stats(&self) -> Stats {
        let counters = self.usb.counters();
        Stats {
            devices: u32::try_from(self.usb.len()).unwrap_or(u32::MAX),
            transfers: counters.transfers,
            bytes_in: counters.bytes_in,
            bytes_out: counters.bytes_out,
            errors: counters.errors,
            waits_for_memory: counters.waits_for_memory,
        }
    }
}

/// Why the transport did not take a device, for programs and for people.
fn explain(reason: &Refused) -> (RefusedCode, String) {
    let code = match reason {
        Refused::BadFile(_) => RefusedCode::BadFile,
        Refused::WrongDevice { .. } => RefusedCode::WrongDevice,
        Refused::Kernel { .. } | Refused::Claim { .. } | Refused::Unusable(_) => RefusedCode::Unusable,
    };
    let text = match std::error::Error::source(reason) {
        Some(source) => format!("{reason}: {source}"),
        None => reason.to_string(),
    };
    (code, text)
}
