//! The shell: waits on all descriptors, turns what they say into the broker's inputs and performs its effects.
//!
//! One thread and one loop that never waits for a device, an instance or an operator; what can wait runs on the workers
//! (`jobs`). No decision is made here: `policy` decides, `broker` plans.

pub mod answer;
mod finish;
mod perform;
mod ports;
mod refresh;
mod revoke;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::channel::Listener;
use common::ids::{DeviceId, VmName};
use common::usbfs::UsbfsFile;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::time::{ClockId, clock_gettime};

use crate::admin::{self, Admin};
use crate::audit::{Audit, Kind, Note};
use crate::broker::{Broker, Input, LinkId};
use crate::cli::Cli;
use crate::guards::Guards;
use crate::hostsleep::HostSleep;
use crate::hostwatch::HostWatch;
use crate::instances::Instances;
use crate::instances::rundir::Watch;
use crate::inventory::Inventory;
use crate::jobs::Workers;
use crate::orders::Orders;
use crate::policy::compile::CompiledPolicy;
use crate::policy::schema::Policy;
use crate::record::{self, Record};
use crate::strings::StringCache;
use crate::sysfs::{Scan, Sysfs};
use crate::topology::Connector;
use crate::uevent::Monitor;
use crate::usbnode::{Nodes, Ready};

/// sysfs is read again after so long even when no event came.
const SAFETY_INTERVAL: Duration = Duration::from_secs(60);
/// Between two readings of sysfs: so many times as long as the last one took. A storm of events then costs a fifth of a
/// processor at most, and a device that is plugged right behind another does not wait on a fast host.
const RESYNC_GAP_READINGS: u32 = 4;
/// Bounds of that: a few events belong to one device; and nobody shall wait for long.
const RESYNC_GAP_LEAST: Duration = Duration::from_millis(10);
const RESYNC_GAP_MOST: Duration = Duration::from_millis(250);
/// Most rounds of deciding and acting in one turn of the loop; what is left is done in the next turn.
const ROUNDS_PER_TURN: usize = 8;

/// At the start, devices are waited for so long: a request of a driver ends after 5 s.
const START_PATIENCE: Duration = Duration::from_secs(6);

/// The daemon cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// `--strict` and a bad policy; what is wrong was logged.
    #[error("the policy is bad and --strict was given; see above, or run `usbpolicyctl check`")]
    Policy,
    /// No events from udev.
    #[error("cannot listen to udev's events; is systemd-udevd running?")]
    Monitor(#[source] io::Error),
    /// No sysfs.
    #[error("cannot list {path}; is USB support in the kernel and /sys mounted?")]
    Sysfs {
        /// Directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory cannot be made.
    #[error("cannot make {path}; start usbpolicyd by its systemd unit, or make the directory for its user")]
    Directory {
        /// Directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket for usbpolicyctl cannot be made.
    #[error("cannot listen at {path}; does another usbpolicyd run, or is its directory not ours?")]
    Admin {
        /// Path of the socket.
        path: PathBuf,
        /// Why.
        source: common::channel::ChannelError,
    },
    /// The daemon cannot give up what it does not need.
    #[error("cannot confine itself (--no-sandbox starts it all the same)")]
    Confine(#[source] common::confine::ConfineError),
    /// The kernel refuses something that should always work.
    #[error("{what} failed")]
    Kernel {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn kernel(what: &'static str) -> impl Fn(nix::Error) -> StartError {
    move |errno| StartError::Kernel { what, source: errno.into() }
}

/// Whether the daemon acts (kernel command line `usbpolicyd.mode=`): the way out when a policy locks people out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Yes.
    Normal,
    /// It decides and logs, and hands nothing over.
    Observe,
    /// It does not even decide.
    Off,
}

impl Mode {
    /// Reads the kernel's command line.
    pub fn from_command_line(text: &str) -> Self {
        let mut words =
            text.split_ascii_whitespace().filter_map(|word| word.strip_prefix("usbpolicyd.mode="));
        match words.next_back() {
            Some("off") => Self::Off,
            None | Some("normal") => Self::Normal,
            // Whoever writes it there is in need: a word spelled wrong must not hand out what locks him out.
            Some(_) => Self::Observe,
        }
    }

    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Observe => "observe",
            Self::Off => "off",
        }
    }
}

/// Whom a device was given to and by which rule: needed when it is long unplugged.
#[derive(Clone, Debug)]
struct Gift {
    connector: Connector,
    vm: VmName,
    rule: String,
    /// Whether the device is reset when the VM gives it up.
    reset: bool,
}

/// Everything the daemon has.
pub struct Daemon {
    /// The one file that was named, instead of the usual places.
    policy_file: Option<PathBuf>,
    mode: Mode,
    sysfs: Sysfs,
    guards: Guards,
    host_watch: HostWatch,
    host_sleep: HostSleep,
    signals: SignalFd,
    monitor: Monitor,
    watch: Watch,
    workers: Workers,
    instances: Instances,
    broker: Broker,
    /// What sysfs said last, without strings.
    last_scan: Scan,
    strings: StringCache,
    inventory: Inventory,
    ports: ports::Ports,
    inherited_hubs: Vec<(UsbfsFile, u64)>,
    record: Record,
    orders: Orders,
    audit: Audit,
    /// Number of the last audit entry that watchers were told.
    told_seq: u64,
    admin: Admin,
    /// What the operator wrote; `None` while no policy could be loaded: everything stays as it is then.
    written: Option<Policy>,
    policy: CompiledPolicy,
    /// Paths of the files that were loaded last.
    policy_names: Vec<String>,
    /// Inputs for the broker that wait for their turn.
    inputs: VecDeque<Input>,
    /// Files that are ready to be sent.
    ready: BTreeMap<DeviceId, Ready>,
    gifts: BTreeMap<DeviceId, Gift>,
    /// Devices that a VM gave up and that are to be reset before anybody else has them.
    reset_due: BTreeSet<DeviceId>,
    /// Devices whose files are confined: their ports stay claimed as long as a VM has them.
    confined_files: BTreeSet<DeviceId>,
    /// Claims outlive us only in the service manager's store; without one no file is confined.
    claims_are_kept: bool,
    /// What operators want back by force.
    revocations: revoke::Revocations,
    /// VMs whose instance is up, the longest first.
    up: Vec<VmName>,
    resync_at: Duration,
    resynced_at: Option<Duration>,
    /// How long it took.
    reading_took: Duration,
    /// The circumstances that decisions were last made in.
    judged: Option<Circumstances>,
    status: String,
    confined: bool,
    ending: bool,
}

/// What a decision depends on besides devices and policy; when it changes, decisions are made again.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Circumstances {
    holders: Vec<(DeviceId, VmName)>,
    up: Vec<VmName>,
}

/// What the loop waits for.
#[derive(Clone, Copy, Debug)]
enum Source {
    Signals,
    Monitor,
    Watch,
    HostWatch,
    HostSleep,
    Workers,
    Link(LinkId),
    Admin(admin::Place),
}

impl Daemon {
    /// Makes everything ready; nothing is handed over yet.
    pub fn new(cli: &Cli, journal: bool) -> Result<Self, StartError> {
        std::fs::create_dir_all(&cli.state_dir)
            .map_err(|source| StartError::Directory { path: cli.state_dir.clone(), source })?;
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT] {
            signals.add(signal);
        }
        // Before any thread starts, so that all of them have the mask.
        signals.thread_block().map_err(kernel("sigprocmask"))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&signals, flags).map_err(kernel("signalfd"))?;
        let monitor = Monitor::new().map_err(StartError::Monitor)?;
        let watch = Watch::new(&cli.run_dir).map_err(kernel("inotify"))?;
        if cli.no_sandbox {
            tracing::warn!("--no-sandbox: whoever takes this process over may do all that its user may");
        } else {
            crate::sandbox::close_file_system(cli).map_err(StartError::Confine)?;
        }
        let workers = Workers::new(&Nodes::default())
            .map_err(|source| StartError::Kernel { what: "thread", source })?;
        let inherited = ports::inherited();
        let commands = inherited.commands.map_or_else(|| listener(&cli.admin_socket), Ok)?;
        let events = inherited.events.map_or_else(|| listener(&cli.events_socket), Ok)?;
        let (record, recalled) = Record::open(&cli.state_dir.join("given.json"), &record::boot_id());
        let confined_files = record.confined();
        let command_line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
        let host_sleep = HostSleep::new().map_err(|source| StartError::Kernel { what: "timerfd", source })?;
        // Milliseconds of this boot and room for 65 536 names in each: no name comes twice, whatever restarts.
        let first_id = u64::try_from(now().as_millis()).unwrap_or(u64::MAX >> 16) << 16;
        let mut daemon = Self {
            policy_file: cli.policy.clone(),
            mode: Mode::from_command_line(&command_line),
            sysfs: Sysfs::default(),
            guards: Guards::default(),
            host_watch: HostWatch::new(Path::new("/proc")),
            host_sleep,
            signals,
            monitor,
            watch,
            workers,
            instances: Instances::new(&cli.run_dir),
            broker: Broker::default(),
            last_scan: Scan::default(),
            strings: StringCache::default(),
            inventory: Inventory::new(first_id, recalled),
            ports: ports::Ports::new(),
            inherited_hubs: inherited.hubs,
            record,
            orders: Orders::open(&cli.state_dir, &cli.order_dir),
            audit: Audit::new(journal),
            told_seq: 0,
            admin: Admin::new(commands, events),
            written: None,
            policy: CompiledPolicy::default(),
            policy_names: Vec::new(),
            inputs: VecDeque::new(),
            ready: BTreeMap::new(),
            gifts: BTreeMap::new(),
            reset_due: BTreeSet::new(),
            confined_files,
            claims_are_kept: std::env::var_os("NOTIFY_SOCKET").is_some(),
            revocations: revoke::Revocations::default(),
            up: Vec::new(),
            resync_at: Duration::ZERO,
            resynced_at: None,
            reading_took: Duration::ZERO,
            judged: None,
            status: String::new(),
            confined: !cli.no_sandbox,
            ending: false,
        };
        if daemon.mode != Mode::Normal {
            let mode = daemon.mode.name();
            tracing::warn!(mode, "usbpolicyd.mode is on the kernel command line: nothing is handed over");
        }
        if !daemon.load_policy("start") && cli.strict {
            return Err(StartError::Policy);
        }
        Ok(daemon)
    }

    /// Runs until SIGTERM.
    pub fn run(&mut self) -> Result<(), StartError> {
        self.start()?;
        while !self.ending {
            self.wait_and_handle(self.timeout(now()))?;
            self.turn();
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        tracing::info!("ending; VMs keep their devices");
        self.finish()
    }

    fn wait_and_handle(&mut self, timeout: Duration) -> Result<(), StartError> {
        let (fds, sources) = self.poll_set();
        let ready = wait(fds, timeout).map_err(|source| StartError::Kernel { what: "poll", source })?;
        for index in ready {
            if let Some(source) = sources.get(index) {
                self.handle(*source);
            }
        }
        Ok(())
    }

    /// Subscribed already; now enumerate, then talk to the instances.
    fn start(&mut self) -> Result<(), StartError> {
        let begun = now();
        let scan = self.sysfs.scan_without_strings().map_err(|source| StartError::Sysfs {
            path: self.sysfs.root().join("bus/usb/devices"),
            source,
        })?;
        if let Some(claims) = &mut self.ports.claims {
            for (file, inode) in self.inherited_hubs.drain(..) {
                claims.inherit(file, inode, &scan);
            }
        }
        self.watch.refresh();
        let awaited = self.instances.with_socket().into_iter().collect();
        self.inputs.push_back(Input::Started(awaited));
        self.pump();
        self.note_reading(begun);
        self.last_scan = scan;
        for (plug, authorized, strings) in self.record.strings() {
            self.strings.recall(plug, authorized, strings);
        }
        self.await_strings().map_err(kernel("poll"))?;
        self.take_last();
        let inputs = self.instances.look(now());
        self.queue(inputs);
        self.turn();
        if self.confined {
            crate::sandbox::close_system_calls().map_err(StartError::Confine)?;
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        Ok(())
    }

    fn poll_set(&self) -> (Vec<PollFd<'_>>, Vec<Source>) {
        let own: [(BorrowedFd<'_>, Source); 5] = [
            (self.signals.as_fd(), Source::Signals),
            (self.host_sleep.as_fd(), Source::HostSleep),
            (self.monitor.as_fd(), Source::Monitor),
            (self.watch.as_fd(), Source::Watch),
            (self.workers.as_fd(), Source::Workers),
        ];
        let links = self.instances.sockets().map(|(link, fd)| (fd, Source::Link(link)));
        let quiet = own.into_iter().chain(links).map(|(fd, source)| (fd, source, PollFlags::POLLIN));
        let clients = self.admin.sockets().map(|(place, fd, waits)| {
            let events = if waits { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
            (fd, Source::Admin(place), events)
        });
        let host = self.host_watch.sockets().map(|(fd, events)| (fd, Source::HostWatch, events));
        quiet.chain(host).chain(clients).map(|(fd, source, events)| (PollFd::new(fd, events), source)).unzip()
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Signals => {
                while let Ok(Some(signal)) = self.signals.read_signal() {
                    match Signal::try_from(signal.ssi_signo.cast_signed()) {
                        Ok(Signal::SIGHUP) => {
                            self.load_policy("SIGHUP");
                        }
                        _ => self.ending = true,
                    }
                }
            }
            Source::Monitor => {
                let seen = self.monitor.drain();
                if seen.overrun {
                    self.audit.add(Note {
                        event: Kind::Overrun,
                        device: None,
                        vm: None,
                        rule: None,
                        text: "events were lost; reading all devices again".to_owned(),
                        actor: "kernel".to_owned(),
                    });
                }
                if seen.is_change() {
                    self.resync_soon();
                }
            }
            Source::Watch => {
                self.watch.drain();
                self.watch.refresh();
                let inputs = self.instances.look(now());
                self.queue(inputs);
            }
            Source::HostWatch => {
                self.host_watch.drain();
                self.resync_soon();
            }
            Source::HostSleep => {
                if let Some(slept) = self.host_sleep.look() {
                    let text = format!("the host slept for {} s; reading all devices again", slept.as_secs());
                    self.note(Kind::Resumed, None, text, "kernel");
                    self.resync_soon();
                }
            }
            Source::Workers => self.finish_jobs(),
            Source::Link(link) => {
                let inputs = self.instances.receive(now(), link);
                self.queue(inputs);
            }
            Source::Admin(admin::Place::Client(client)) => {
                self.admin.flush(client);
                self.serve(client);
            }
            Source::Admin(place) => self.admin.accept(place),
        }
    }

    /// Everything that is due, and all that follows from it.
    fn turn(&mut self) {
        let now = now();
        let inputs = self.instances.tick(now);
        self.queue(inputs);
        if self.broker.deadline_after(Duration::ZERO).is_some_and(|at| at <= now) {
            self.inputs.push_back(Input::Tick);
        }
        self.revoke_what_is_due(now);
        // What is ready goes out before sysfs is read.
        self.pump();
        if self.resync_due() <= now {
            self.resync();
        }
        self.tell_of_silent_devices();
        for _ in 0..ROUNDS_PER_TURN {
            self.pump();
            if self.judged.as_ref() == Some(&self.circumstances()) {
                break;
            }
            self.judge();
        }
        self.report_status();
        self.tell_watchers();
    }

    /// Reads sysfs as soon as [`Self::resync_due`] allows.
    fn resync_soon(&mut self) {
        self.resync_at = self.resync_at.min(now());
    }

    /// When sysfs is read next. A device that is on its way to its VM does not wait for a reading: they come further apart
    /// while the workers have something to do.
    fn resync_due(&self) -> Duration {
        let gap = if self.workers.are_busy() { RESYNC_GAP_MOST } else { gap_after(self.reading_took) };
        self.resync_at.max(self.resynced_at.map_or(Duration::ZERO, |at| at.saturating_add(gap)))
    }

    fn timeout(&self, now: Duration) -> Duration {
        let watchdog = sd_notify::watchdog_enabled().map(|limit| now.saturating_add(limit / 2));
        let due = [
            Some(self.resync_due()),
            self.broker.deadline_after(now),
            self.instances.deadline(),
            self.inventory.deadline_after(now),
            self.next_revocation(),
            self.strings.deadline(),
            watchdog,
        ];
        let at = due.into_iter().flatten().min().unwrap_or(now);
        at.saturating_sub(now)
    }

    fn queue(&mut self, inputs: Vec<Input>) {
        self.inputs.extend(inputs);
    }
}

/// How long sysfs is left alone after a reading that took so long.
fn gap_after(reading: Duration) -> Duration {
    reading.saturating_mul(RESYNC_GAP_READINGS).clamp(RESYNC_GAP_LEAST, RESYNC_GAP_MOST)
}

/// Listens for usbpolicyctl, or for those who want to be told what happens.
fn listener(path: &Path) -> Result<Listener, StartError> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)
            .map_err(|source| StartError::Directory { path: directory.to_owned(), source })?;
    }
    Admin::bind(path).map_err(|source| StartError::Admin { path: path.to_owned(), source })
}

/// Time since boot, without the time asleep: nobody is late because the host slept.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default()
}

/// Waits for the descriptors and returns the places of those with news.
fn wait(mut fds: Vec<PollFd<'_>>, timeout: Duration) -> io::Result<Vec<usize>> {
    // Rounded up, or the loop would turn without end for the last millisecond.
    let millis = u64::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(u64::MAX);
    let timeout = PollTimeout::try_from(millis.min(60_000)).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let has_news = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
    Ok(fds.iter().enumerate().filter(|(_, fd)| has_news(fd)).map(|(index, _)| index).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_mode_on_the_kernel_command_line_counts() {
        assert_eq!(
            Mode::from_command_line("quiet usbpolicyd.mode=off usbpolicyd.mode=observe\n"),
            Mode::Observe
        );
        assert_eq!(Mode::from_command_line("usbpolicyd.mode=off"), Mode::Off);
        assert_eq!(Mode::from_command_line("xusbpolicyd.mode=off root=/dev/sda"), Mode::Normal);
        assert_eq!(Mode::from_command_line("usbpolicyd.mode=normal"), Mode::Normal);
        // A slip of the pen of somebody who is locked out.
        assert_eq!(Mode::from_command_line("usbpolicyd.mode=OFF"), Mode::Observe);
    }

    #[test]
    fn fast_host_is_read_again_soon_and_a_slow_one_keeps_most_of_its_time() {
        let ms = Duration::from_millis;
        assert_eq!(gap_after(Duration::ZERO), ms(10));
        assert_eq!(gap_after(ms(12)), ms(48));
        assert_eq!(gap_after(Duration::from_secs(3)), ms(250));
    }

    #[test]
    fn now_never_runs_back() {
        let first = now();
        assert!(now() >= first && first > Duration::ZERO);
    }
}
