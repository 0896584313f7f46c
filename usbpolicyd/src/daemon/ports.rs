//! Port claims, and the descriptors that the service manager keeps for us over a restart.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use common::channel::Listener;
use common::ids::DeviceId;
use common::usbfs::UsbfsFile;
use rustix::process::{PidfdFlags, PidfdGetfdFlags};
use sd_notify::NotifyState;

use super::Daemon;
use crate::admin::Admin;
use crate::broker::{Input, OnRelease};
use crate::claims::{self, Claims, Outcome, Plan};
use crate::jobs::Job;
use crate::sysfs::{Plug, Scan, port_name};

/// Name of the socket for usbpolicyctl (`FileDescriptorName=` of usbpolicyd.socket).
const ADMIN: &str = "admin";
/// What the names of kept hub files begin with; their inode number follows.
const HUB: &str = "hub-";

/// What the service manager handed us.
#[derive(Default)]
pub(super) struct Inherited {
    /// The socket for usbpolicyctl.
    pub(super) admin: Option<Admin>,
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
        if name == ADMIN {
            match Listener::try_from(fd) {
                Ok(listener) => found.admin = Some(Admin::new(listener)),
                Err(error) => tracing::warn!(%error, "the socket of usbpolicyd.socket is of no use"),
            }
        } else if let Some(inode) = name.strip_prefix(HUB).and_then(|inode| inode.parse().ok()) {
            // A hub that is gone is none any more.
            found.hubs.extend(UsbfsFile::new(fd).ok().map(|file| (file, inode)));
        }
    }
    found
}

/// Makes an inherited number ours. `pidfd_getfd` on ourselves is the safe way from a number to an [`OwnedFd`]; the number
/// itself is closed, or the claims of a hub would outlive our file of it.
fn take_over(number: RawFd) -> io::Result<OwnedFd> {
    let ourselves = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    let fd = rustix::process::pidfd_getfd(ourselves, number, PidfdGetfdFlags::empty())?;
    nix::unistd::close(number)?;
    Ok(fd)
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
    /// Works out which ports should be claimed now and sees to it.
    pub(super) fn plan_claims(&mut self, scan: &Scan) {
        if self.written.is_none() || self.mode != super::Mode::Normal {
            // Without a policy, or told to keep still: what is claimed stays claimed.
            return;
        }
        let plan = claims::plan(&self.policy, scan);
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
