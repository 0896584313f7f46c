//! The running `usbvfiod`s: found by their sockets below `/run/usbvfiod`, dialled, greeted and asked what they hold.
//!
//! The path is the name: `/run/usbvfiod/<vm>/policy.sock` is the instance of `<vm>`, if its process is the owner of
//! that directory; what it says about itself does not count. One connection per VM; while it lives, a second instance
//! at the same path is left alone. Nothing here waits: connecting to a UNIX socket succeeds at once or not at all, and
//! each answer has a deadline.
//!
//! This module knows connections, not devices: what the answers mean is the broker's business.

pub mod rundir;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::channel::{Channel, ChannelError};
use common::ids::{DeviceId, VmName};
use common::wire::{AttachedDevice, FromInstance, PROTOCOL_VERSION, Stats, ToInstance};
use tracing::{debug, info, warn};

use crate::broker::{Hold, Input, LinkId};

/// How long an instance may take to answer `Hello` and all of `List`.
pub const GREETING_DEADLINE: Duration = Duration::from_secs(5);
/// Pauses between two tries to reach an instance whose socket is there.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Most devices that an instance can hold: what xHCI has slots for.
const HOLDS_MAX: usize = 256;
/// Most messages that are taken from one instance in one turn, so that none can keep the loop.
const MESSAGES_PER_TURN: usize = 64;

/// What an instance said about itself. For display only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Root ports for low, full and high speed.
    pub usb2_ports: u8,
    /// Root ports for SuperSpeed.
    pub usb3_ports: u8,
    /// Whether a VMM was connected when it was asked.
    pub vmm_connected: bool,
}

#[derive(Debug)]
enum Stage {
    /// Nobody to talk to; the next try is due then, if the socket is there.
    Away { retry_at: Option<Duration>, pause: Duration },
    /// Connected, `Hello` sent.
    Greeting { channel: Channel, until: Duration },
    /// Greeted; `List` is being answered, page by page.
    Listing { channel: Channel, until: Duration, holds: Vec<Hold> },
    /// In use.
    Up { channel: Channel },
}

/// One VM that has, had or may have an instance.
#[derive(Debug)]
struct Instance {
    path: PathBuf,
    link: LinkId,
    stage: Stage,
    greeting: Option<Greeting>,
    stats: Option<Stats>,
    /// Said once per reason, not at every try.
    complaint: Option<String>,
    /// The broker was told that it is down, or up; `None` while it knows nothing.
    told_up: Option<bool>,
}

/// All of them.
#[derive(Debug)]
pub struct Instances {
    run_dir: PathBuf,
    explicit: BTreeMap<VmName, PathBuf>,
    vms: BTreeMap<VmName, Instance>,
    next_link: u64,
}

impl Instances {
    /// Instances whose sockets are below `run_dir`.
    pub fn new(run_dir: impl Into<PathBuf>) -> Self {
        Self { run_dir: run_dir.into(), explicit: BTreeMap::new(), vms: BTreeMap::new(), next_link: 0 }
    }

    /// The directory they are looked for in.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Takes the sockets that the policy names. They go before those of the directory. A connection that is up stays.
    pub fn set_explicit(&mut self, explicit: BTreeMap<VmName, PathBuf>) {
        self.explicit = explicit;
        for (vm, instance) in &mut self.vms {
            instance.path = path_of(&self.run_dir, &self.explicit, vm);
        }
    }

    /// VMs that have a socket now, whoever answers there.
    pub fn with_socket(&self) -> Vec<VmName> {
        let mut found: Vec<VmName> = rundir::vms(&self.run_dir);
        found.extend(self.explicit.keys().cloned());
        found.extend(self.vms.keys().cloned());
        found.sort_unstable();
        found.dedup();
        found.retain(|vm| path_of(&self.run_dir, &self.explicit, vm).exists());
        found
    }

    /// Looks at all sockets and dials where nobody is talked to yet. Call it when a directory changed.
    pub fn look(&mut self, now: Duration) -> Vec<Input> {
        let mut inputs = Vec::new();
        for vm in self.with_socket() {
            if let Some(Instance { stage: Stage::Away { .. }, .. }) | None = self.vms.get(&vm) {
                self.dial(now, &vm, &mut inputs);
            }
        }
        inputs
    }

    fn dial(&mut self, now: Duration, vm: &VmName, inputs: &mut Vec<Input>) {
        let path = path_of(&self.run_dir, &self.explicit, vm);
        self.next_link += 1;
        let link = LinkId(self.next_link);
        let instance = self.vms.entry(vm.clone()).or_insert_with(|| Instance {
            path: path.clone(),
            link,
            stage: Stage::Away { retry_at: None, pause: RETRY_FIRST },
            greeting: None,
            stats: None,
            complaint: None,
            told_up: None,
        });
        let pause = if let Stage::Away { pause, .. } = instance.stage { pause } else { RETRY_FIRST };
        instance.link = link;
        match greet(&path) {
            Ok(channel) => {
                instance.stage = Stage::Greeting { channel, until: now.saturating_add(GREETING_DEADLINE) };
            }
            Err(problem) => {
                let retry_at = problem.retry.then(|| now.saturating_add(pause));
                let pause = pause.saturating_mul(2).min(RETRY_MAX);
                instance.stage = Stage::Away { retry_at, pause };
                if problem.is_down && instance.told_up != Some(false) {
                    instance.told_up = Some(false);
                    inputs.push(Input::Down(vm.clone()));
                }
                // A socket is refused for a moment between bind and listen: not worth a word.
                if pause > RETRY_FIRST.saturating_mul(4) || !problem.retry {
                    instance.complain(vm, problem.text);
                }
            }
        }
    }

    /// Does what is due: gives up on instances that do not answer, dials again.
    pub fn tick(&mut self, now: Duration) -> Vec<Input> {
        let mut inputs = Vec::new();
        let vms: Vec<VmName> = self.vms.keys().cloned().collect();
        for vm in vms {
            let Some(instance) = self.vms.get_mut(&vm) else { continue };
            match &instance.stage {
                Stage::Greeting { until, .. } | Stage::Listing { until, .. } if *until <= now => {
                    instance.complain(&vm, "usbvfiod does not answer; trying again".to_owned());
                    let retry_at = Some(now.saturating_add(RETRY_MAX));
                    instance.stage = Stage::Away { retry_at, pause: RETRY_MAX };
                }
                Stage::Away { retry_at: Some(at), .. } if *at <= now => self.dial(now, &vm, &mut inputs),
                _ => {}
            }
        }
        inputs
    }

    /// When [`Self::tick`] has something to do.
    pub fn deadline(&self) -> Option<Duration> {
        let deadlines = self.vms.values().filter_map(|instance| match &instance.stage {
            Stage::Greeting { until, .. } | Stage::Listing { until, .. } => Some(*until),
            Stage::Away { retry_at, .. } => *retry_at,
            Stage::Up { .. } => None,
        });
        deadlines.min()
    }

    /// Whether an instance was there of which nobody knows by now if it still is.
    pub fn are_unsure(&self) -> bool {
        self.vms.values().any(|instance| instance.told_up.is_none())
    }

    /// All open connections, for the poll set.
    pub fn sockets(&self) -> impl Iterator<Item = (LinkId, BorrowedFd<'_>)> {
        self.vms.values().filter_map(|instance| match &instance.stage {
            Stage::Greeting { channel, .. } | Stage::Listing { channel, .. } | Stage::Up { channel } => {
                Some((instance.link, channel.as_fd()))
            }
            Stage::Away { .. } => None,
        })
    }

    /// Takes what the instance of this connection sent.
    pub fn receive(&mut self, now: Duration, link: LinkId) -> Vec<Input> {
        let mut inputs = Vec::new();
        let Some(vm) = self.vm_of(link) else { return inputs };
        for _ in 0..MESSAGES_PER_TURN {
            let Some(instance) = self.vms.get_mut(&vm).filter(|instance| instance.link == link) else {
                break;
            };
            match instance.receive(&vm, link, &mut inputs) {
                Ok(true) => {}
                Ok(false) => break,
                Err(text) => {
                    self.close(now, &vm, text, &mut inputs);
                    break;
                }
            }
        }
        inputs
    }

    /// Sends a message. When that fails the connection is closed, which the answer tells the broker.
    pub fn send(
        &mut self,
        now: Duration,
        link: LinkId,
        message: &ToInstance,
        file: Option<BorrowedFd<'_>>,
    ) -> Vec<Input> {
        let mut inputs = Vec::new();
        let Some(vm) = self.vm_of(link) else { return inputs };
        if let Some(Instance { stage: Stage::Up { channel }, .. }) = self.vms.get(&vm)
            && let Err(error) = channel.send(message, file)
        {
            self.close(now, &vm, error.to_string(), &mut inputs);
        }
        inputs
    }

    /// Closes a connection and looks at once whether the instance still lives.
    fn close(&mut self, now: Duration, vm: &VmName, text: String, inputs: &mut Vec<Input>) {
        let Some(instance) = self.vms.get_mut(vm) else { return };
        let was_up = matches!(instance.stage, Stage::Up { .. });
        instance.stage = Stage::Away { retry_at: None, pause: RETRY_FIRST };
        instance.greeting = None;
        if was_up {
            info!(%vm, reason = text, "connection to usbvfiod closed");
            instance.told_up = None;
            inputs.push(Input::Lost(vm.clone(), instance.link));
            self.dial(now, vm, inputs);
        } else {
            instance.complain(vm, text);
            instance.stage =
                Stage::Away { retry_at: Some(now.saturating_add(RETRY_FIRST * 4)), pause: RETRY_FIRST * 8 };
        }
    }

    fn vm_of(&self, link: LinkId) -> Option<VmName> {
        self.vms.iter().find(|(_, instance)| instance.link == link).map(|(vm, _)| vm.clone())
    }

    /// What a VM's instance said about itself, while it is up.
    pub fn greeting(&self, vm: &VmName) -> Option<Greeting> {
        self.vms.get(vm)?.greeting
    }

    /// The last counters an instance sent.
    pub fn stats(&self, vm: &VmName) -> Option<Stats> {
        self.vms.get(vm)?.stats
    }

    /// Why a VM's instance cannot be reached, if that is so.
    pub fn complaint(&self, vm: &VmName) -> Option<&str> {
        self.vms.get(vm)?.complaint.as_deref()
    }

    /// Where a VM's socket is looked for.
    pub fn path(&self, vm: &VmName) -> PathBuf {
        path_of(&self.run_dir, &self.explicit, vm)
    }
}

fn path_of(run_dir: &Path, explicit: &BTreeMap<VmName, PathBuf>, vm: &VmName) -> PathBuf {
    match explicit.get(vm) {
        Some(path) => path.clone(),
        None => run_dir.join(vm.as_str()).join(rundir::SOCKET),
    }
}

/// Why an instance cannot be talked to.
struct Problem {
    text: String,
    /// It does not run: nobody listens, or there is no socket.
    is_down: bool,
    /// Worth another try without a change in the directory.
    retry: bool,
}

/// Connects, checks who is there, says hello.
fn greet(path: &Path) -> Result<Channel, Problem> {
    let unknown = |text: String| Problem { text, is_down: false, retry: true };
    let channel = Channel::dial(path).map_err(|error| dial_problem(path, &error))?;
    let peer = channel.peer().map_err(|error| unknown(error.to_string()))?;
    let directory = path.parent().unwrap_or(path);
    let owner = std::fs::metadata(directory)
        .map_err(|error| unknown(format!("cannot look at {}: {error}", directory.display())))?
        .uid();
    if peer.uid() != owner {
        return Err(unknown(format!(
            "the process at {} runs as uid {}, but {} belongs to uid {owner}: not this VM's usbvfiod",
            path.display(),
            peer.uid(),
            directory.display()
        )));
    }
    match channel.send(&ToInstance::Hello { version: PROTOCOL_VERSION }, None) {
        Ok(()) => Ok(channel),
        Err(error) => Err(unknown(error.to_string())),
    }
}

fn dial_problem(path: &Path, error: &ChannelError) -> Problem {
    let path = path.display();
    let ChannelError::Io { source, .. } = error else {
        return Problem { text: format!("{path}: {error}"), is_down: false, retry: true };
    };
    match source.kind() {
        io::ErrorKind::NotFound => {
            Problem { text: format!("no socket at {path}"), is_down: true, retry: false }
        }
        // Between bind and listen, or left behind by a process that died.
        io::ErrorKind::ConnectionRefused => {
            Problem { text: format!("nobody listens at {path}"), is_down: true, retry: true }
        }
        io::ErrorKind::PermissionDenied => Problem {
            text: format!(
                "no right to connect to {path}: the socket needs group usbpolicyd and mode 0660 \
                 (Group=usbpolicyd in usbvfiod@.service), its directory the same group or mode 0755"
            ),
            is_down: false,
            retry: true,
        },
        _ => Problem { text: format!("cannot connect to {path}: {source}"), is_down: false, retry: true },
    }
}

impl Instance {
    /// Tells the operator, once per text.
    fn complain(&mut self, vm: &VmName, text: String) {
        if self.complaint.as_ref() != Some(&text) {
            warn!(%vm, "{text}");
            self.complaint = Some(text);
        }
    }

    /// Takes one message; `Ok(false)` when there is none. An error closes the connection.
    fn receive(&mut self, vm: &VmName, link: LinkId, inputs: &mut Vec<Input>) -> Result<bool, String> {
        let channel = match &mut self.stage {
            Stage::Greeting { channel, .. } | Stage::Listing { channel, .. } | Stage::Up { channel } => {
                channel
            }
            Stage::Away { .. } => return Ok(false),
        };
        let Some((message, file)) = channel.receive::<FromInstance>().map_err(|error| error.to_string())?
        else {
            return Ok(false);
        };
        if file.is_some() {
            return Err("a file came from usbvfiod, which never sends one".to_owned());
        }
        let stage = std::mem::replace(&mut self.stage, Stage::Away { retry_at: None, pause: RETRY_FIRST });
        self.stage = match (stage, message) {
            (_, FromInstance::Error { text }) => return Err(format!("usbvfiod says: {text:?}")),
            (Stage::Greeting { channel, until }, FromInstance::Hello { version, .. })
                if version != PROTOCOL_VERSION =>
            {
                drop((channel, until));
                return Err(format!(
                    "usbvfiod speaks protocol version {version}, this daemon {PROTOCOL_VERSION}: \
                     install both from one release"
                ));
            }
            (
                Stage::Greeting { channel, until },
                FromInstance::Hello { usb2_ports, usb3_ports, vmm_connected, .. },
            ) => {
                self.greeting = Some(Greeting { usb2_ports, usb3_ports, vmm_connected });
                ask(&channel, None)?;
                Stage::Listing { channel, until, holds: Vec::new() }
            }
            (Stage::Listing { channel, until, mut holds }, FromInstance::Devices { devices, more }) => {
                let last = devices.last().map(|device| device.id);
                holds.extend(devices.into_iter().map(hold));
                if holds.len() > HOLDS_MAX {
                    return Err(format!("usbvfiod claims to hold more than {HOLDS_MAX} devices"));
                }
                match (more, last) {
                    (true, Some(_)) => {
                        ask(&channel, last)?;
                        Stage::Listing { channel, until, holds }
                    }
                    (true, None) => return Err("usbvfiod promises more devices on an empty page".to_owned()),
                    (false, _) => {
                        info!(%vm, devices = holds.len(), "usbvfiod is up");
                        self.complaint = None;
                        self.told_up = Some(true);
                        inputs.push(Input::Up(vm.clone(), link, holds));
                        Stage::Up { channel }
                    }
                }
            }
            (Stage::Up { channel }, message) => {
                self.account(vm, link, message, inputs)?;
                Stage::Up { channel }
            }
            // Something happened in the instance before it answered: the `List` that follows tells.
            (stage @ Stage::Listing { .. }, FromInstance::Gone { id, .. }) => {
                debug!(%vm, %id, "gone while listing");
                stage
            }
            (stage @ Stage::Listing { .. }, FromInstance::ResetDone { .. }) => stage,
            (_, message) => return Err(format!("usbvfiod sent {message:?} out of turn")),
        };
        Ok(true)
    }

    fn account(
        &mut self,
        vm: &VmName,
        link: LinkId,
        message: FromInstance,
        inputs: &mut Vec<Input>,
    ) -> Result<(), String> {
        match message {
            FromInstance::Attached { id, port } => inputs.push(Input::Attached(link, id, port)),
            FromInstance::Refused { id, code, text } => {
                inputs.push(Input::Refused(link, id, format!("{} ({code:?})", text.escape_debug())));
            }
            FromInstance::Detached { id } => inputs.push(Input::Detached(link, id)),
            FromInstance::Gone { id, text } => {
                inputs.push(Input::Gone(link, id, text.escape_debug().to_string()));
            }
            FromInstance::ResetDone { id, ok } => debug!(%vm, %id, ok, "guest reset a device"),
            FromInstance::Pong { stats, .. } => self.stats = Some(stats),
            message => return Err(format!("usbvfiod sent {message:?} out of turn")),
        }
        Ok(())
    }
}

fn ask(channel: &Channel, after: Option<DeviceId>) -> Result<(), String> {
    channel.send(&ToInstance::List { after }, None).map_err(|error| error.to_string())
}

fn hold(device: AttachedDevice) -> Hold {
    Hold { id: device.id, address: device.address, ports: device.path, guest_port: device.port }
}
