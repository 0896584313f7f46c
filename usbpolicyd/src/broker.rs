//! Who holds which device, and what has to happen next. Pure: inputs in, effects out, the time is an argument.
//!
//! *Desired* is what each [`Entry`] wants; *actual* is what the instances (the running `usbvfiod`s) report. Every
//! step applies an input to the books and then takes, for each device, the one action that brings actual nearer to
//! desired. Nothing here depends on the order in which events arrive, and an event that is lost is made good by the
//! next inventory or the next `List`.
//!
//! One promise stands above all others: a device never has two holders. It leaves the books of one VM only when
//! that VM's instance says so, or is gone, or the device is.
//!
//! This module does not decide which VM a device is for (`policy`), opens nothing and sends nothing (`daemon`).

mod answers;
#[cfg(test)]
mod model;
mod settle;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::ids::{BusAddress, DeviceId, PortChain, VmName};

/// How long an instance may take to answer `Attach`.
pub const ATTACH_DEADLINE: Duration = Duration::from_secs(5);
/// How long an instance may take to answer `Detach`, when the policy (`[revoke] deadline`) does not say otherwise.
pub const DETACH_DEADLINE: Duration = Duration::from_secs(2);
/// The first pause after a failed hand-over; each further failure doubles it.
pub const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// The longest pause between two tries.
pub const BACKOFF_MAX: Duration = Duration::from_secs(300);
/// A device that stayed with its VM this long has proven itself: its next failure counts as the first.
pub const STEADY_AFTER: Duration = Duration::from_secs(30);
/// After a start nothing is handed over before all instances told what they hold, or this long.
pub const START_BARRIER: Duration = Duration::from_millis(1500);

/// One connection to one instance. A number is never used twice, so late answers of an old connection are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// What happens to a device when its VM no longer has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OnRelease {
    /// The host's drivers get it back.
    Host,
    /// Nobody gets it: it stays without drivers until its VM is there again.
    Hold,
    /// As `Hold`, and the kernel forgets its configuration (`authorized` = 0).
    Deauthorize,
}

/// One device that is plugged in now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name; a new one for each plug-in.
    pub id: DeviceId,
    /// Where the kernel has it.
    pub address: BusAddress,
    /// The way to it from its root hub.
    pub ports: PortChain,
    /// The VM it is for, if any. Whether one VM may take it from another is decided before (`policy::decide`).
    pub want: Option<VmName>,
    /// What happens when it leaves its VM.
    pub on_release: OnRelease,
    /// The rule that assigns it and how many devices that one may attach at once, if there is such a limit.
    pub quota: Option<(String, usize)>,
    /// Whether the host has authorized it. A try before can only fail, and needs no long pause afterwards.
    pub authorized: bool,
    /// What a former run of this daemon did with it. Counts only when the device is new to the broker.
    pub recalled: Option<Touched>,
}

/// What we did with a device: the host's drivers do not have it, and only we can give it back to them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Touched {
    /// Drivers taken off, or about to be. No VM has it.
    Taken,
    /// Deauthorized as well.
    Deauthorized,
    /// This VM's instance may have the open file.
    Given(VmName),
}

impl Touched {
    /// The VM whose instance may have the open file.
    pub const fn holder(&self) -> Option<&VmName> {
        match self {
            Self::Given(vm) => Some(vm),
            Self::Taken | Self::Deauthorized => None,
        }
    }
}

/// One device in an instance's answer to `List`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// The name under which it was handed over.
    pub id: DeviceId,
    /// Bus and device number, as the instance read them from its file.
    pub address: BusAddress,
    /// The way to it, as the instance read it from its file.
    pub ports: PortChain,
    /// The guest's port.
    pub guest_port: u8,
}

/// Whether a VM gets devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Service {
    /// By the rules.
    #[default]
    Running,
    /// It keeps what it has and gets nothing new.
    Paused,
    /// It loses what it has and gets nothing.
    Drained,
}

/// Why a hand-over did not come about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For the operator.
    pub text: String,
    /// The device is not what the inventory says: read it again.
    pub stale: bool,
}

/// What the broker is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The daemon has started; these instances have a socket and have not answered yet.
    Started(BTreeSet<VmName>),
    /// All devices that are plugged in now, and how many devices each VM may have (no number: no limit).
    Inventory(Vec<Entry>, BTreeMap<VmName, usize>),
    /// An instance answered `Hello` and `List` on a new connection.
    Up(VmName, LinkId, Vec<Hold>),
    /// The connection closed. Whether the instance lives is not known: its devices stay in the books.
    Lost(VmName, LinkId),
    /// The instance is gone, and the kernel closed its files.
    Down(VmName),
    /// [`Effect::Prepare`] ended. On failure the host's drivers are as before.
    Prepared(DeviceId, Result<(), Failure>),
    /// The instance took the device to this port of the guest.
    Attached(LinkId, DeviceId, u8),
    /// The instance did not take it.
    Refused(LinkId, DeviceId, String),
    /// The instance let go.
    Detached(LinkId, DeviceId),
    /// The instance let go unasked.
    Gone(LinkId, DeviceId, String),
    /// The port of this device was kept from the host's drivers until now: they have not seen it.
    Unclaimed(DeviceId),
    /// [`Effect::Return`] ended.
    Returned(DeviceId, Result<(), Failure>),
    /// An operator changed what a VM gets.
    Serve(VmName, Service),
    /// An operator wants a failed device tried again now.
    Retry(DeviceId),
    /// Time passed.
    Tick,
}

/// Why a device leaves a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It is not plugged in any more.
    Unplugged,
    /// No rule gives it to this VM any more.
    NotWanted,
    /// Another VM takes it over.
    Moved,
    /// The VM is being emptied.
    Drained,
    /// The instance did not answer in time.
    NoAnswer,
    /// The instance let it go unasked.
    LetGo,
    /// The instance is gone.
    InstanceDown,
}

impl Why {
    /// For log lines and `usbpolicyctl`.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Unplugged => "unplugged",
            Self::NotWanted => "no longer assigned",
            Self::Moved => "moved to another VM",
            Self::Drained => "the VM is drained",
            Self::NoAnswer => "no answer from usbvfiod",
            Self::LetGo => "let go by usbvfiod",
            Self::InstanceDown => "usbvfiod is gone",
        }
    }
}

/// Something the operator can notice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The VM has the device.
    Attached(DeviceId, VmName, u8),
    /// The VM was found holding the device, from a former run of this daemon.
    Adopted(DeviceId, VmName, u8),
    /// The VM no longer has the device.
    Detached(DeviceId, VmName, Why),
    /// A try failed; the next one is in so long.
    Failed(DeviceId, VmName, String, Duration),
    /// The instance does not let go of the device.
    Stuck(DeviceId, VmName),
    /// The device is back with the host, held or deauthorized.
    Released(DeviceId, OnRelease),
    /// What its release asks for failed; the next try is in so long.
    NotReleased(DeviceId, String, Duration),
    /// An instance claims a device that another VM has, or that does not exist.
    Foreign(DeviceId, VmName),
}

/// What the shell has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Open the node, verify it, detach the host's drivers, keep the file; answer with [`Input::Prepared`].
    Prepare(DeviceId),
    /// Send the kept file with `Attach` and close it here.
    Send(VmName, LinkId, DeviceId),
    /// Close the kept file.
    Discard(DeviceId),
    /// Send `Detach`.
    Detach(LinkId, DeviceId),
    /// Do what the device's release asks; answer with [`Input::Returned`].
    Return(DeviceId, OnRelease),
    /// The device is known by another name now: the one under which an instance holds it.
    Rename(DeviceId, DeviceId),
    /// Read sysfs again.
    Resync,
    /// Tell the operator.
    Report(Event),
}

/// Whose hands a device is in while no VM has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Custody {
    /// The host's drivers may have it; we did not touch it.
    Host,
    /// We took the host's drivers off.
    Ours,
    /// We took the drivers off and deauthorized it.
    Deauthorized,
}

/// Where a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Free,
    Preparing { vm: VmName },
    Offered { vm: VmName, link: LinkId, until: Duration },
    Held { vm: VmName, guest_port: u8, since: Duration },
    Leaving { vm: VmName, until: Duration, why: Why },
    Stuck { vm: VmName },
    Returning { how: OnRelease },
}

impl Place {
    /// The VM whose instance may have the open file.
    const fn holder(&self) -> Option<&VmName> {
        match self {
            Self::Offered { vm, .. }
            | Self::Held { vm, .. }
            | Self::Leaving { vm, .. }
            | Self::Stuck { vm } => Some(vm),
            Self::Free | Self::Preparing { .. } | Self::Returning { .. } => None,
        }
    }

    /// The VM that has the device or is about to: what counts against its limit.
    const fn counts_for(&self) -> Option<&VmName> {
        match self {
            Self::Preparing { vm } => Some(vm),
            _ => self.holder(),
        }
    }
}

/// Failed tries and when the next one is due.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Backoff {
    failures: u32,
    /// It was not the hand-over that failed last, but what comes after it.
    releasing: bool,
    until: Duration,
    text: String,
}

impl Backoff {
    fn fail(&mut self, now: Duration, text: String) -> Duration {
        let pause = BACKOFF_FIRST.saturating_mul(1 << self.failures.min(16)).min(BACKOFF_MAX);
        self.failures = self.failures.saturating_add(1);
        self.releasing = false;
        self.until = now.saturating_add(pause);
        self.text = text;
        pause
    }
}

#[derive(Clone, Debug)]
struct Device {
    entry: Entry,
    present: bool,
    place: Place,
    custody: Custody,
    backoff: Backoff,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Link {
    #[default]
    Down,
    Unknown,
    Up(LinkId),
}

#[derive(Clone, Debug, Default)]
struct Machine {
    link: Link,
    service: Service,
}

/// The books. See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Broker {
    devices: BTreeMap<DeviceId, Device>,
    machines: BTreeMap<VmName, Machine>,
    limits: BTreeMap<VmName, usize>,
    awaited: BTreeSet<VmName>,
    awaited_until: Duration,
    /// None: [`DETACH_DEADLINE`].
    detach_deadline: Option<Duration>,
}

/// Where a device is, for display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// With the host, untouched.
    Host,
    /// Without drivers, kept for its VM.
    OnHold,
    /// Deauthorized by us.
    Deauthorized,
    /// Being handed over to this VM.
    Attaching(VmName),
    /// With this VM, at this port of the guest (0: not known yet).
    Attached(VmName, u8),
    /// Leaving this VM.
    Detaching(VmName),
    /// This VM's instance does not let go.
    Stuck(VmName),
    /// Being given back.
    Releasing,
    /// For this VM, whose instance does not run.
    VmDown(VmName),
    /// For this VM, which is paused or drained.
    VmPaused(VmName),
    /// For this VM, which has as many devices as it, or the rule, may have.
    VmFull(VmName),
    /// A try failed; the next one is in so long.
    Failed(VmName, String, Duration),
    /// What its release asks for failed; the next try is in so long.
    NotReleased(String, Duration),
    /// Waiting for the instances to tell what they hold.
    Starting,
}

/// How one VM's instance is, for display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineState {
    /// Whether its instance answers: `None` when that is not known.
    pub up: Option<bool>,
    /// What it gets.
    pub service: Service,
    /// How many devices it has.
    pub devices: usize,
}

impl Broker {
    /// Applies one input at the time `now` (any clock that never runs back) and tells what to do.
    pub fn step(&mut self, now: Duration, input: Input) -> Vec<Effect> {
        let mut out = Vec::new();
        self.apply(now, input, &mut out);
        self.expire(now, &mut out);
        self.settle(now, &mut out);
        out
    }

    /// When to call [`Self::step`] with [`Input::Tick`] at the latest: the next time after `now` that changes something.
    pub fn deadline_after(&self, now: Duration) -> Option<Duration> {
        let barrier = (!self.awaited.is_empty()).then_some(self.awaited_until);
        let devices = self.devices.values().filter_map(|device| match &device.place {
            Place::Offered { until, .. } | Place::Leaving { until, .. } => Some(*until),
            Place::Free if device.backoff.failures > 0 => Some(device.backoff.until),
            _ => None,
        });
        barrier.into_iter().chain(devices).filter(|at| *at > now).min()
    }

    /// How long an instance has to answer `Detach`.
    pub fn detach_deadline(&self) -> Duration {
        self.detach_deadline.unwrap_or(DETACH_DEADLINE)
    }

    /// From now on instances have so long to answer `Detach`.
    pub const fn set_detach_deadline(&mut self, deadline: Duration) {
        self.detach_deadline = Some(deadline);
    }

    /// Whether it was us who took the host's authorization from the device.
    pub fn is_deauthorized(&self, id: DeviceId) -> bool {
        self.devices.get(&id).is_some_and(|device| device.custody == Custody::Deauthorized)
    }

    /// Whether a VM has the device or is about to get it.
    pub fn is_given(&self, id: DeviceId) -> bool {
        self.devices.get(&id).is_some_and(|device| device.place.counts_for().is_some())
    }

    /// The VM whose instance may have this device's open file now.
    pub fn holder(&self, id: DeviceId) -> Option<&VmName> {
        self.devices.get(&id)?.place.holder()
    }

    /// All devices that are not as the host's drivers know them, for the record that outlives this process.
    pub fn touched(&self) -> impl Iterator<Item = (DeviceId, Touched)> {
        self.devices.iter().filter_map(|(id, device)| Some((*id, device.touched()?)))
    }

    /// All devices that a VM's instance may have.
    pub fn holders(&self) -> impl Iterator<Item = (DeviceId, &VmName)> {
        self.devices.iter().filter_map(|(id, device)| Some((*id, device.place.holder()?)))
    }

    /// Where this device is.
    pub fn state(&self, now: Duration, id: DeviceId) -> Option<State> {
        let device = self.devices.get(&id)?;
        Some(match &device.place {
            Place::Preparing { vm } | Place::Offered { vm, .. } => State::Attaching(vm.clone()),
            Place::Held { vm, guest_port, .. } => State::Attached(vm.clone(), *guest_port),
            Place::Leaving { vm, .. } => State::Detaching(vm.clone()),
            Place::Stuck { vm } => State::Stuck(vm.clone()),
            Place::Returning { .. } => State::Releasing,
            Place::Free => self.free_state(now, device),
        })
    }

    fn free_state(&self, now: Duration, device: &Device) -> State {
        if device.backoff.failures > 0 && device.backoff.releasing {
            let pause = device.backoff.until.saturating_sub(now);
            return State::NotReleased(device.backoff.text.clone(), pause);
        }
        if let Some(vm) = device.entry.want.clone() {
            let machine = self.machines.get(&vm).cloned().unwrap_or_default();
            return match (machine.link, machine.service) {
                (Link::Down | Link::Unknown, _) => State::VmDown(vm),
                (_, Service::Paused | Service::Drained) => State::VmPaused(vm),
                _ if !self.awaited.is_empty() => State::Starting,
                _ if device.backoff.failures > 0 => {
                    let pause = device.backoff.until.saturating_sub(now);
                    State::Failed(vm, device.backoff.text.clone(), pause)
                }
                _ => State::VmFull(vm),
            };
        }
        match device.custody {
            Custody::Host => State::Host,
            Custody::Ours => State::OnHold,
            Custody::Deauthorized => State::Deauthorized,
        }
    }

    /// The VMs whose instances were ever seen, and those with a service other than the usual.
    pub fn machines(&self) -> impl Iterator<Item = (&VmName, MachineState)> {
        self.machines.iter().map(|(name, machine)| {
            let up = match machine.link {
                Link::Down => Some(false),
                Link::Unknown => None,
                Link::Up(_) => Some(true),
            };
            let devices = self.devices.values().filter(|device| device.place.holder() == Some(name)).count();
            (name, MachineState { up, service: machine.service, devices })
        })
    }
}
