//! Port claims, and the descriptors that the service manager keeps for us over a restart.

use std::io::IoSlice;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};

use anyhow::Context as _;
use common::channel::{Channel, Listener};
use common::ids::DeviceId;
use common::usbfs::UsbfsFile;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use sd_notify::NotifyState;

use super::Daemon;
use crate::broker::{Input, OnRelease};
use crate::claims::{self, Claims, Outcome, Plan};
use crate::jobs::Job;
use crate::sysfs::{Plug, Scan, port_name};

/// Name of the socket for usbpolicyctl (`FileDescriptorName=` of usbpolicyd.socket).
const ADMIN: &str = "admin";
/// Name of the socket for events (`FileDescriptorName=` of usbpolicyd-events.socket).
const EVENTS: &str = "events";
/// What the names of kept hub files begin with; their inode number follows.
const HUB: &str = "hub-";

/// What the service manager handed us.
#[derive(Default)]
pub(super) struct Inherited {
    /// The socket for usbpolicyctl.
    pub(super) commands: Option<Listener>,
    /// The socket for events.
    pub(super) events: Option<Listener>,
    /// Open hubs, with the inode numbers of their directories.
    pub(super) hubs: Vec<(UsbfsFile, u64)>,
}

/// Takes what the service manager handed us. What is none of ours is closed.
pub(super) fn inherited() -> Inherited {
    let mut found = Inherited::default();
    let Ok(all) = sd_notify::listen_fds_with_names() else { return found };
    for (number, name) in all {
        let fd = match take_over(number) {
            Ok(fd) => fd,
            Err(error) => {
                tracing::warn!(number, name, %error, "cannot take over a descriptor of the service manager");
                continue;
            }
        };
        if name == ADMIN || name == EVENTS {
            let place = if name == ADMIN { &mut found.commands } else { &mut found.events };
            match Listener::try_from(fd) {
                Ok(listener) => *place = Some(listener),
                Err(error) => tracing::warn!(name, %error, "a socket of the service manager is of no use"),
            }
        } else if let Some(inode) = name.strip_prefix(HUB).and_then(|inode| inode.parse().ok()) {
            // A hub that is gone is none any more.
            found.hubs.extend(UsbfsFile::new(fd).ok().map(|file| (file, inode)));
        }
    }
    found
}

/// Makes an inherited number ours: sends it to ourselves, which is a safe way from a number to an [`OwnedFd`] and, unlike
/// `pidfd_getfd`, needs no system call that the unit does not allow. The number itself is closed, or the claims of a hub
/// would outlive our file of it.
fn take_over(number: RawFd) -> anyhow::Result<OwnedFd> {
    let (ours, mut theirs) = Channel::pair()?;
    let files = [number];
    let parts = [IoSlice::new(b"null")];
    let control = [ControlMessage::ScmRights(&files)];
    sendmsg::<()>(ours.as_fd().as_raw_fd(), &parts, &control, MsgFlags::MSG_DONTWAIT, None)?;
    nix::unistd::close(number)?;
    let arrived = theirs.receive::<()>()?;
    arrived.and_then(|((), file)| file).context("the descriptor did not arrive")
}

/// The ports we hold and what we know of them while a worker is busy with them.
#[derive(Default)]
pub(super) struct Ports {
    /// `None` while a worker has them.
    pub(super) claims: Option<Claims>,
    /// What was last handed to a worker.
    carried: Option<Plan>,
    /// What waits for the worker.
    next: Option<Plan>,
    pub(super) names: Vec<String>,
    /// Releases that wait until the ports of their devices are free.
    pub(super) waiting: Vec<(DeviceId, OnRelease)>,
    problems: Vec<String>,
}

impl Ports {
    /// Nothing claimed yet.
    pub(super) fn new() -> Self {
        Self { claims: Some(Claims::default()), ..Self::default() }
    }

    /// Whether a worker is claiming or releasing ports now.
    pub(super) const fn is_busy(&self) -> bool {
        self.claims.is_none()
    }
}

impl Daemon {
    /// Whether the port that a device is plugged into is claimed by us now.
    pub(super) fn is_on_claimed_port(&self, name: &str) -> bool {
        self.ports.names.iter().any(|port| port_name(port).is_some_and(|port| port.to_string() == name))
    }

    /// Works out which ports should be claimed now and sees to it.
    pub(super) fn plan_claims(&mut self, scan: &Scan) {
        if self.written.is_none() || self.mode != super::Mode::Normal {
            // Without a policy, or told to keep still: what is claimed stays claimed.
            return;
        }
        let needs_claim = |device: &&crate::sysfs::Present| {
            self.inventory.id_of(&device.plug).is_some_and(|id| self.confined_files.contains(&id))
        };
        let kept = scan.devices.iter().filter(needs_claim).map(|device| device.facts.connector.clone());
        let plan = claims::plan(&self.policy, scan, &kept.collect::<Vec<_>>());
        if self.ports.carried.as_ref() != Some(&plan) || plan.has_dead_hubs() {
            self.ports.next = Some(plan);
            self.start_claims();
        }
    }

    fn start_claims(&mut self) {
        if self.ports.next.is_none() {
            return;
        }
        let Some(claims) = self.ports.claims.take() else { return };
        let Some(plan) = self.ports.next.take() else { return };
        self.ports.carried = Some(plan.clone());
        self.workers.start(Job::Claim(claims, plan));
    }

    pub(super) fn claimed(&mut self, claims: Claims, outcome: Outcome) {
        for plug in &outcome.closed {
            let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(&store_name(plug))]);
        }
        for plug in &outcome.opened {
            if let Some(fd) = claims.file(plug) {
                let name = store_name(plug);
                let state = [NotifyState::FdStore, NotifyState::FdName(&name)];
                // Without a service manager, or without a store, the claims end with this process.
                let _ = sd_notify::notify_with_fds(&state, &[fd]);
            }
        }
        for problem in outcome.problems.iter().filter(|one| !self.ports.problems.contains(one)) {
            tracing::warn!("{problem}");
        }
        self.ports.problems = outcome.problems;
        let names = claims.ports();
        if names != self.ports.names {
            tracing::info!(ports = names.join(" "), "ports kept from the host's drivers");
            self.ports.names = names;
        }
        self.ports.claims = Some(claims);
        if outcome.look_again {
            self.resync_soon();
        }
        self.start_claims();
        if !self.ports.is_busy() {
            for (id, how) in std::mem::take(&mut self.ports.waiting) {
                self.release(id, how);
            }
        }
        for name in outcome.released.iter().filter_map(|port| port_name(port)) {
            let name = name.to_string();
            let found = self.inventory.iter().find(|(_, item)| item.present.facts.sys_name == name);
            if let Some((id, _)) = found {
                self.inputs.push_back(Input::Unclaimed(id));
            }
        }
    }
}

fn store_name(plug: &Plug) -> String {
    format!("{HUB}{}", plug.inode)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::IntoRawFd as _;

    use super::*;

    #[test]
    fn descriptor_that_is_taken_over_is_the_same_file_and_its_number_is_closed() {
        let (mut end, other) = std::os::unix::net::UnixStream::pair().unwrap();
        let number = other.into_raw_fd();
        let taken = take_over(number).unwrap();
        end.write_all(b"x").unwrap();
        let mut byte = [0];
        std::fs::File::from(taken).read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
        // Nobody else has it: the other end is closed now.
        assert_eq!(end.read(&mut byte).unwrap(), 0);
    }

    #[test]
    fn number_that_is_no_descriptor_is_an_error() {
        assert!(take_over(1_000_000).is_err());
    }
}
