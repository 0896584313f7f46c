//! Reading sysfs and the policy, deciding, and telling the broker.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use common::ids::DeviceId;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Circumstances, Daemon, Mode, SAFETY_INTERVAL, START_PATIENCE, now};
use crate::audit::{Kind, Note, Subject};
use crate::broker::{Input, Touched};
use crate::facts::Strings;
use crate::inventory::Item;
use crate::jobs::{Done, Job};
use crate::policy::compile::compile;
use crate::policy::decide::{Context, Verdict};
use crate::policy::load::{Layer, load};
use crate::policy_files::{Places, read_path};
use crate::strings::Order;
use crate::sysfs::{Plug, Present, Scan};
use crate::topology::Topology;

impl Daemon {
    /// Reads sysfs and decides about everything. Waits for no device.
    pub(super) fn resync(&mut self) {
        let begun = now();
        let scan = self.sysfs.scan_without_strings();
        // Behind the reading, so that a slow one is not followed by the next at once.
        self.note_reading(begun);
        match scan {
            Ok(scan) => {
                let took_us = self.reading_took.as_micros();
                tracing::debug!(devices = scan.devices.len(), took_us, "sysfs read");
                self.last_scan = scan;
                self.take_last();
            }
            Err(error) => {
                tracing::error!(%error, "cannot read /sys/bus/usb/devices; trying again");
            }
        }
    }

    /// sysfs was read now; it began at `begun`.
    pub(super) fn note_reading(&mut self, begun: Duration) {
        let now = now();
        self.reading_took = now.saturating_sub(begun);
        self.resynced_at = Some(now);
        self.resync_at = now.saturating_add(SAFETY_INTERVAL);
    }

    /// Takes the last reading with all strings that are known by now, and has those read that are not.
    pub(super) fn take_last(&mut self) {
        let mut scan = self.last_scan.clone();
        for order in self.strings.complete(now(), &mut scan) {
            self.workers.start(Job::ReadStrings(order));
        }
        self.take(scan);
    }

    /// At the start: has all strings read that the last run did not leave, and waits for them, so that the inventory is
    /// complete when the instances tell what they hold. Nothing else is under way yet.
    pub(super) fn await_strings(&mut self) -> nix::Result<()> {
        let deadline = now().saturating_add(START_PATIENCE);
        for order in self.strings.complete(now(), &mut self.last_scan.clone()) {
            self.workers.start(Job::ReadStrings(order));
        }
        while self.workers.are_busy() {
            let left = deadline.saturating_sub(now());
            if left.is_zero() {
                break;
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            match poll(&mut [PollFd::new(self.workers.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
            for done in self.workers.finished() {
                if let Done::Strings(order, strings) = done {
                    self.strings_arrived(order, strings);
                }
            }
        }
        Ok(())
    }

    /// A worker has read the strings of a device.
    pub(super) fn strings_arrived(&mut self, order: Order, strings: Option<Strings>) {
        let name = name_of(&order.plug);
        if let Some(took) = self.strings.arrived(now(), order, strings) {
            tracing::warn!(device = name, "answers after {} s", took.as_secs());
        }
    }

    /// Tells the operator of devices that do not answer.
    pub(super) fn tell_of_silent_devices(&mut self) {
        for plug in self.strings.late(now()) {
            tracing::warn!(
                device = name_of(&plug),
                "does not answer: the host's drivers or another program keep it busy. It is decided about when its strings \
                 can be read; pull it, or see the kernel's log"
            );
        }
    }

    fn take(&mut self, mut scan: Scan) {
        let keyboards = self.guards.assess(&mut scan);
        let now = now();
        let before: BTreeMap<DeviceId, Subject> =
            self.inventory.iter().map(|(id, item)| (id, subject(id, &item.present))).collect();
        if scan.topology != *self.inventory.topology() {
            self.compile_policy(&scan.topology);
        }
        self.plan_claims(&scan);
        self.inventory.take(now, scan, keyboards);
        if let Err(error) = self.orders.tidy(self.inventory.iter().map(|(_, item)| &item.present)) {
            tracing::error!("{:#}", anyhow::Error::from(error));
        }
        let mut gone = before;
        let (mut new, mut new_ids) = (Vec::new(), Vec::new());
        for (id, item) in self.inventory.iter() {
            if gone.remove(&id).is_none() {
                new.push(subject(id, &item.present));
                new_ids.push(id);
            }
        }
        for id in gone.keys() {
            self.reset_due.remove(id);
            self.confined_files.remove(id);
        }
        for device in gone.into_values() {
            self.note(Kind::Unplugged, Some(device), String::new(), "kernel");
        }
        for device in new {
            self.note(Kind::Plugged, Some(device), String::new(), "kernel");
        }
        self.keep_returned(&new_ids);
        self.judge();
    }

    /// Decides about each device and hands the result to the broker.
    pub(super) fn judge(&mut self) {
        let circumstances = self.circumstances();
        let holders: BTreeMap<_, _> = circumstances.holders.iter().cloned().collect();
        let up = &circumstances.up;
        let orders = &self.orders;
        let context = |id: DeviceId, item: &Item| Context {
            holder: holders.get(&id).cloned(),
            order: orders.of(&item.present).cloned(),
            up: up.clone(),
            ..Context::default()
        };
        let (mut entries, changed) = self.inventory.judge(now(), &self.policy, context);
        if self.written.is_none() || self.mode != Mode::Normal {
            // Without a policy, or told to keep still: whoever has a device keeps it.
            for entry in &mut entries {
                let recalled = entry.recalled.as_ref().and_then(Touched::holder);
                entry.want = holders.get(&entry.id).or(recalled).cloned();
            }
        }
        for id in changed {
            self.note_verdict(id);
        }
        let limits = self.policy.vms.iter().filter_map(|(name, vm)| {
            Some((name.clone(), usize::try_from(vm.limits.max_devices?).unwrap_or(usize::MAX)))
        });
        let limits = limits.collect();
        self.judged = Some(circumstances);
        self.inputs.push_back(Input::Inventory(entries, limits));
        self.pump();
    }

    pub(super) fn circumstances(&self) -> Circumstances {
        let holders = self.broker.holders().map(|(id, vm)| (id, vm.clone())).collect();
        Circumstances { holders, up: self.up.clone() }
    }

    fn note_verdict(&mut self, id: DeviceId) {
        let Some(item) = self.inventory.get(id) else { return };
        if self.mode == Mode::Off {
            return;
        }
        let (vm, text) = describe(&item.verdict);
        let note = Note {
            event: Kind::Decision,
            device: Some(subject(id, &item.present)),
            vm,
            rule: item.rule().map(str::to_owned),
            text,
            actor: "policy".to_owned(),
        };
        self.audit.add(note);
    }

    pub(super) fn note(&mut self, event: Kind, device: Option<Subject>, text: String, actor: &str) {
        self.audit.add(Note { event, device, vm: None, rule: None, text, actor: actor.to_owned() });
    }

    /// Loads the policy. On failure the old one stays, and everything wrong with the new one is logged.
    pub(super) fn load_policy(&mut self, actor: &str) -> bool {
        let sources = match &self.policy_file {
            Some(path) => read_path(path, Layer::Main),
            None => Places::default().read(),
        };
        let sources = match sources {
            Ok(sources) => sources,
            Err(error) => {
                let text = format!("{:#}", anyhow::Error::from(error));
                self.note(Kind::PolicyRefused, None, text, actor);
                return false;
            }
        };
        let loaded = match load(&sources) {
            Ok(loaded) => loaded,
            Err(problems) => {
                for problem in &problems {
                    let text = problem.to_string().replace('\n', "; ").replace(char::is_control, " ");
                    self.note(Kind::PolicyRefused, None, text, actor);
                }
                return false;
            }
        };
        let files = sources.len();
        self.policy_names = sources.into_iter().map(|source| source.path).collect();
        self.written = Some(loaded.policy);
        let topology = self.inventory.topology().clone();
        self.compile_policy(&topology);
        let text = format!(
            "{files} files, {} assign and {} deny rules, {} VMs",
            self.policy.rules.len(),
            self.policy.denies.len(),
            self.policy.vms.len()
        );
        self.note(Kind::PolicyLoaded, None, text, actor);
        let sockets = self.policy.vms.iter();
        let explicit: BTreeMap<_, _> = sockets
            .filter_map(|(name, vm)| Some((name.clone(), PathBuf::from(vm.socket.as_ref()?))))
            .collect();
        let directories: BTreeSet<PathBuf> =
            explicit.values().filter_map(|path| Some(path.parent()?.to_owned())).collect();
        self.instances.set_explicit(explicit);
        self.watch.set_extra(directories);
        self.watch.refresh();
        // Decide again with the new rules at the end of this turn.
        self.judged = None;
        self.resync_at = Duration::ZERO;
        true
    }

    fn compile_policy(&mut self, topology: &Topology) {
        if let Some(written) = &self.written {
            self.policy = compile(written, topology);
            self.broker.set_detach_deadline(self.policy.revoke.deadline);
        }
    }
}

/// The kernel's name of a device, `1-4.2`.
fn name_of(plug: &Plug) -> String {
    plug.syspath.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// What the audit says of a device.
pub(super) fn subject(id: DeviceId, present: &Present) -> Subject {
    let facts = &present.facts;
    Subject {
        id,
        name: facts.sys_name.clone(),
        connector: facts.connector.to_string(),
        ids: facts.id.to_string(),
        serial: facts.serial.clone(),
    }
}

/// A verdict in words, with the VM that it is about.
pub(super) fn describe(verdict: &Verdict) -> (Option<common::ids::VmName>, String) {
    let names = |vms: &[common::ids::VmName]| {
        vms.iter().map(|vm| vm.as_str().to_owned()).collect::<Vec<_>>().join(", ")
    };
    match verdict {
        Verdict::Protected { why } => (None, format!("protected: {}", why.escape_debug())),
        Verdict::Busy { why } => (None, format!("busy: {}", why.escape_debug())),
        Verdict::Denied { reason, .. } => {
            let reason = reason.as_deref().unwrap_or("no reason given");
            (None, format!("denied: {}", reason.escape_debug()))
        }
        Verdict::Assign { vm, .. } => (Some(vm.clone()), "assigned".to_owned()),
        Verdict::Unexpected { vm, why, .. } => {
            (Some(vm.clone()), format!("not what the rule expects: {}", why.escape_debug()))
        }
        Verdict::Conflict { vms, rules } => {
            (None, format!("conflict between VMs {} (rules {})", names(vms), rules.join(", ").escape_debug()))
        }
        Verdict::Manual { vms, .. } => (None, format!("waits for an operator, for VMs {}", names(vms))),
        Verdict::Kept { actor } => (None, format!("kept on the host by {}", actor.escape_debug())),
        Verdict::Host => (None, "no rule names it; it stays with the host".to_owned()),
    }
}
