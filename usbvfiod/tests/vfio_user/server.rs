//! A server on a socket: the loop of the daemon in small, around a PCI function whose BAR 0 is memory.

use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use usbvfiod::guest_memory::GuestMemory;
use usbvfiod::pci;
use usbvfiod::pci::config::{ConfigSpace, Ids};
use usbvfiod::pci::msix::Msix;
use usbvfiod::urb::{DmaFault, GuestMem};
use usbvfiod::vfio_user::message::Region;
use usbvfiod::vfio_user::session::{Request, Session, Token};
use usbvfiod::vfio_user::transport::{Connection, Listener, Received};

/// Vectors of the test device.
pub(crate) const VECTORS: u16 = 20;

/// The device, for the test to look at while the server serves it.
pub(crate) struct Device {
    pub(crate) memory: GuestMemory,
    pub(crate) msix: Msix,
    pub(crate) config: ConfigSpace,
    pub(crate) registers: Vec<u8>,
    /// What the session handed out, one line each.
    pub(crate) log: Vec<String>,
    /// Requests that can be finished later are kept back while this is set.
    pub(crate) is_busy: bool,
    pub(crate) connections: u32,
}

impl Device {
    pub(crate) fn dma_read(&self, addr: u64, len: usize) -> Result<Vec<u8>, DmaFault> {
        let mut data = vec![0; len];
        self.memory.read(addr, &mut data).map(|()| data)
    }
}

/// A running server; ends when dropped.
pub(crate) struct Server {
    path: PathBuf,
    device: Arc<Mutex<Device>>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Server {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vfio-user.sock");
        let listener = Listener::bind(&path).unwrap();
        let device = Arc::new(Mutex::new(Device {
            memory: GuestMemory::new().unwrap(),
            msix: Msix::new(VECTORS),
            config: ConfigSpace::new(Ids::default(), VECTORS),
            registers: vec![0; pci::REGISTERS_SIZE as usize],
            log: Vec::new(),
            is_busy: false,
            connections: 0,
        }));
        let (wake, woken) = UnixStream::pair().unwrap();
        let served = Arc::clone(&device);
        let thread = std::thread::spawn(move || serve(&listener, &woken, &served));
        Self { path, device, wake, thread: Some(thread), _dir: dir }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap()
    }

    /// The device is no longer busy: what was kept back is finished.
    pub(crate) fn become_idle(&self) {
        self.device().is_busy = false;
        (&self.wake).write_all(&[1]).unwrap();
    }

    /// Waits until the device looks as the test wants it, which the server's thread brings about.
    pub(crate) fn wait_for(&self, what: impl Fn(&Device) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !what(&self.device()) {
            assert!(Instant::now() < deadline, "the server did not get there");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.wake.shutdown(std::net::Shutdown::Both);
        let result = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(result, Some(Ok(()))), "the server died");
        }
    }
}

struct Client {
    connection: Connection,
    session: Session,
    kept_back: Option<Token>,
}

fn serve(listener: &Listener, woken: &UnixStream, device: &Mutex<Device>) {
    let mut client: Option<Client> = None;
    loop {
        let mut fds = vec![
            PollFd::new(woken.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        if let Some(client) = &client {
            let mut interest = PollFlags::empty();
            interest.set(PollFlags::POLLIN, client.session.wants_to_receive());
            interest.set(PollFlags::POLLOUT, client.session.wants_to_send());
            fds.push(PollFd::new(client.connection.as_fd(), interest));
        }
        poll(&mut fds, PollTimeout::NONE).unwrap();
        let is_ready = |index: usize| fds.get(index).is_some_and(|fd| fd.any().unwrap());
        let (wants_wake, wants_accept, has_traffic) = (is_ready(0), is_ready(1), is_ready(2));
        let mut device = device.lock().unwrap();
        if wants_wake {
            let mut byte = [0];
            if !matches!(std::io::Read::read(&mut &*woken, &mut byte), Ok(1)) {
                return;
            }
        }
        let is_gone = client.as_mut().is_some_and(|client| {
            let received = if has_traffic {
                client.connection.receive(&mut client.session)
            } else {
                Ok(Received::Nothing)
            };
            if !device.is_busy
                && let Some(token) = client.kept_back.take()
            {
                client.session.finish(token, Ok(()));
            }
            handle(client, &mut device);
            let sent = client.connection.send(&mut client.session);
            handle(client, &mut device);
            received.is_err()
                || received.is_ok_and(|it| it == Received::EndOfStream)
                || sent.is_err()
                || client.session.is_over()
        });
        if is_gone {
            disconnect(&mut client, &mut device);
        }
        if wants_accept && let Some(connection) = listener.accept().unwrap() {
            device.connections += 1;
            if client.as_ref().is_some_and(|client| client.connection.has_hung_up()) {
                disconnect(&mut client, &mut device);
            }
            if client.is_none() {
                let session = Session::new(pci::layout(VECTORS), device.connections);
                client = Some(Client { connection, session, kept_back: None });
            }
        }
    }
}

fn disconnect(client: &mut Option<Client>, device: &mut Device) {
    *client = None;
    device.registers.fill(0);
    device.config.reset();
    device.memory.unmap(usbvfiod::vfio_user::message::DmaUnmap::All);
    device.msix.disconnect();
    device.log.push("gone".into());
}

fn handle(client: &mut Client, device: &mut Device) {
    while let Some(request) = client.session.next_request() {
        device.log.push(describe(&request));
        match request {
            Request::RegionRead { region, offset, data } => match region {
                Region::Bar(0) => data.copy_from_slice(&device.registers[offset as usize..][..data.len()]),
                Region::Bar(pci::MSIX_BAR) => device.msix.read(offset, data),
                Region::Config => device.config.read(offset, data),
                _ => {}
            },
            Request::RegionWrite { region, offset, data } => match region {
                Region::Bar(0) => device.registers[offset as usize..][..data.len()].copy_from_slice(data),
                Region::Bar(pci::MSIX_BAR) => device.msix.write(offset, data),
                Region::Config => device.config.write(offset, data),
                _ => {}
            },
            Request::SetIrqs(change) => device.msix.apply(change),
            Request::DmaMap { token, map, file } => {
                let result = device.memory.map(&map, file);
                finish(client, device, token, result);
            }
            Request::DmaUnmap { token, range } => {
                device.memory.unmap(range);
                finish(client, device, token, Ok(()));
            }
            Request::Reset { token } => {
                device.registers.fill(0);
                device.config.reset();
                device.msix.reset();
                finish(client, device, token, Ok(()));
            }
        }
    }
}

fn finish(client: &mut Client, device: &Device, token: Token, result: Result<(), nix::errno::Errno>) {
    if device.is_busy && result.is_ok() {
        client.kept_back = Some(token);
    } else {
        client.session.finish(token, result);
    }
}

fn describe(request: &Request<'_>) -> String {
    match request {
        Request::RegionRead { region, offset, data } => format!("read {region:?} {offset:#x} {}", data.len()),
        Request::RegionWrite { region, offset, data } => {
            format!("write {region:?} {offset:#x} {}", data.len())
        }
        Request::SetIrqs(_) => "irqs".into(),
        Request::DmaMap { map, file, .. } => {
            format!("map {:#x} {:#x} file={}", map.address, map.size, file.is_some())
        }
        Request::DmaUnmap { range, .. } => format!("unmap {range:x?}"),
        Request::Reset { .. } => "reset".into(),
    }
}

/// What the tests of the crate's client run against: the server above, or a real program.
pub(crate) enum Target {
    InProcess(Server),
    Program { child: Child, path: PathBuf, _dir: tempfile::TempDir },
}

/// Whether somebody takes connections at a socket: its file is there some time before that.
fn is_listening(path: &Path) -> bool {
    // SO_ACCEPTCON of linux/net.h, in the column of flags.
    const LISTENS: &str = " 00010000 ";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let end = format!(" {}", path.display());
    sockets.lines().any(|line| line.contains(LISTENS) && line.ends_with(&end))
}

impl Target {
    pub(crate) fn in_process() -> Self {
        Self::InProcess(Server::start())
    }

    /// The daemon, confined as always.
    pub(crate) fn program() -> Self {
        let program = std::env::var_os("USBVFIOD_TEST_BINARY");
        let program = program.unwrap_or_else(|| env!("CARGO_BIN_EXE_usbvfiod").into());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vfio-user.sock");
        let policy = dir.path().join("policy.sock");
        let mut command = Command::new(program);
        command.arg("--socket-path").arg(&path).arg("--policy-socket").arg(policy);
        let child = command.env("USBVFIOD_LOG", "warn").spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_listening(&path) {
            assert!(Instant::now() < deadline, "the program did not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self::Program { child, path, _dir: dir }
    }

    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::InProcess(server) => server.path(),
            Self::Program { path, .. } => path,
        }
    }

    /// Does something while the server stands still, so that it finds all of it at once.
    pub(crate) fn while_stopped<T>(&self, what: impl FnOnce() -> T) -> T {
        match self {
            Self::InProcess(server) => {
                let _device = server.device();
                what()
            }
            Self::Program { child, .. } => {
                let pid = Pid::from_raw(child.id() as i32);
                kill(pid, Signal::SIGSTOP).unwrap();
                let result = what();
                kill(pid, Signal::SIGCONT).unwrap();
                result
            }
        }
    }

    /// The device, unless it lives in another process.
    pub(crate) fn server(&self) -> Option<&Server> {
        match self {
            Self::InProcess(server) => Some(server),
            Self::Program { .. } => None,
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Self::Program { child, .. } = self {
            let exited = child.try_wait();
            let _ = child.kill();
            let _ = child.wait();
            if !std::thread::panicking() {
                assert!(matches!(exited, Ok(None)), "the program ended by itself: {exited:?}");
            }
        }
    }
}
