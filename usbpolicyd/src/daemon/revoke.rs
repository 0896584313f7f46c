//! Taking a device back by force, step by step: ask for it (`Detach`), wait for the deadline, switch its port off and on.
//! The instance keeps nothing but a dead file then; the device comes back as a new plug-in.
//!
//! An operator's order goes all the way; without one the last step is taken only if the policy says so (`[revoke] hard`).

use std::collections::BTreeMap;
use std::time::Duration;

use common::ids::{DeviceId, VendorProduct, VmName};

use super::refresh::subject;
use super::{Daemon, now};
use crate::admin::wire::Lasting;
use crate::audit::{Kind, Subject};
use crate::broker::State;
use crate::jobs::Job;
use crate::policy::decide::Order;
use crate::sysfs::Present;
use crate::topology::Connector;

/// How long after its port was switched on a device is waited for; some are slow to start.
const BACK_WITHIN: Duration = Duration::from_secs(60);
/// From an operator's word until the instance is asked, with room.
const ASKING_TAKES: Duration = Duration::from_millis(250);

/// What operators want back, and whom they want it kept from when it is there again.
#[derive(Debug, Default)]
pub(super) struct Revocations {
    asked: BTreeMap<DeviceId, Revocation>,
    /// Whose ports are being switched; in the inventory they may be gone before that has ended.
    switching: BTreeMap<DeviceId, Subject>,
    returning: Vec<Returning>,
}

/// One device that has to leave its VM, whatever its instance does.
#[derive(Clone, Debug)]
struct Revocation {
    lasting: Lasting,
    actor: String,
    /// When force is used, also if nobody knows whether the instance lives.
    until: Duration,
}

/// One device that went with its port and is expected back.
#[derive(Clone, Debug)]
struct Returning {
    /// Its name before.
    id: DeviceId,
    connector: Connector,
    ids: VendorProduct,
    serial: Option<String>,
    actor: String,
    until: Duration,
}

impl Returning {
    fn is_it(&self, present: &Present) -> bool {
        let facts = &present.facts;
        facts.connector.meets(&self.connector) && facts.id == self.ids && facts.serial == self.serial
    }
}

impl Daemon {
    /// Begins to take a device from its VM. Says what happens.
    pub(super) fn revoke(&mut self, id: DeviceId, lasting: Lasting, actor: &str) -> Result<String, String> {
        let Some(holder) = self.broker.holder(id).cloned() else {
            return Err("no VM has it; `usbpolicyctl detach` keeps it on the host".to_owned());
        };
        let stuck = matches!(self.broker.state(now(), id), Some(State::Stuck(_)));
        self.order(id, Order::Keep { actor: actor.to_owned() }, lasting, actor)?;
        let until = now().saturating_add(self.broker.detach_deadline()).saturating_add(ASKING_TAKES);
        self.revocations.asked.insert(id, Revocation { lasting, actor: actor.to_owned(), until });
        if stuck {
            self.cut_off(id);
            return Ok(format!("{holder} did not give it back; switching its port off and on"));
        }
        let deadline = self.broker.detach_deadline().as_millis();
        Ok(format!(
            "asking {holder} for it; its port is switched off and on if it is not back in {deadline} ms"
        ))
    }

    /// The instance does not let go: the port goes off and on, if somebody wants that.
    pub(super) fn stuck(&mut self, id: DeviceId, vm: &VmName) -> String {
        if self.policy.revoke.hard || self.revocations.asked.contains_key(&id) {
            self.cut_off(id);
            return "usbvfiod does not let go of it; switching its port off and on".to_owned();
        }
        format!(
            "usbvfiod does not let go of it; `usbpolicyctl revoke` switches its port off and on, or end \
             usbvfiod@{vm}, or pull the device"
        )
    }

    fn cut_off(&mut self, id: DeviceId) {
        let Some(item) = self.inventory.get(id) else {
            self.revocations.asked.remove(&id);
            return;
        };
        if self.revocations.switching.insert(id, subject(id, &item.present)).is_some() {
            self.revocations.asked.remove(&id);
            return;
        }
        let asked = self.revocations.asked.remove(&id);
        if let Some(Revocation { lasting: Lasting::UntilUnplug, actor, .. }) = asked {
            // For the operator the device is not unplugged: what comes back is still not for any VM.
            let facts = &item.present.facts;
            self.revocations.returning.push(Returning {
                id,
                connector: facts.connector.clone(),
                ids: facts.id,
                serial: facts.serial.clone(),
                actor,
                until: now().saturating_add(BACK_WITHIN),
            });
        }
        self.workers.start(Job::Revoke(id, Box::new(item.present.clone())));
    }

    /// The port was switched off and on, or not.
    pub(super) fn cut_off_ended(&mut self, id: DeviceId, result: Result<(), String>) {
        let device = self.revocations.switching.remove(&id);
        let text = match result {
            Ok(()) => "its port was switched off and on".to_owned(),
            Err(text) => {
                self.revocations.returning.retain(|one| one.id != id);
                text
            }
        };
        self.note(Kind::Revoked, device, text, "policy");
        self.resync_soon();
    }

    /// Uses force where the time to answer is over. An instance whose connection broke is not even asked.
    pub(super) fn revoke_what_is_due(&mut self, now: Duration) {
        let asked = self.revocations.asked.iter();
        let due: Vec<DeviceId> = asked.filter(|(_, one)| one.until <= now).map(|(id, _)| *id).collect();
        for id in due {
            if self.broker.is_given(id) {
                self.cut_off(id);
            } else {
                self.revocations.asked.remove(&id);
            }
        }
    }

    /// When to call [`Self::revoke_what_is_due`].
    pub(super) fn next_revocation(&self) -> Option<Duration> {
        self.revocations.asked.values().map(|one| one.until).min()
    }

    /// A VM no longer has a device: nothing is left to be done by force.
    pub(super) fn given_back(&mut self, id: DeviceId) {
        self.revocations.asked.remove(&id);
    }

    /// Keeps what came back after its port was switched from all VMs, as it was ordered.
    pub(super) fn keep_returned(&mut self, new: &[DeviceId]) {
        let now = now();
        self.revocations.returning.retain(|one| one.until > now);
        for id in new {
            let Some(item) = self.inventory.get(*id) else { continue };
            let place = self.revocations.returning.iter().position(|one| one.is_it(&item.present));
            let Some(returned) = place.map(|place| self.revocations.returning.swap_remove(place)) else {
                continue;
            };
            let order = Order::Keep { actor: returned.actor.clone() };
            let device: Option<Subject> = Some(subject(*id, &item.present));
            let given = self.orders.give(&item.present, order, Lasting::UntilUnplug);
            match given {
                Ok(()) => {
                    let text =
                        "back after it was revoked; stays with the host, until it is unplugged".to_owned();
                    self.note(Kind::Order, device, text, &returned.actor);
                }
                Err(error) => tracing::error!("{:#}", anyhow::Error::from(error)),
            }
        }
    }
}
