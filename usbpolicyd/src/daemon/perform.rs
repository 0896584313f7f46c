//! The broker's effects, performed.

use std::os::fd::AsFd;

use common::ids::DeviceId;
use common::wire::{Attach, ResetPolicy, ToInstance};

use super::refresh::subject;
use super::{Daemon, Gift, now};
use crate::audit::{Kind, Note};
use crate::broker::{Effect, Event, Failure, Input, LinkId, OnRelease, Touched};
use crate::jobs::{Done, Job};
use crate::policy::schema::{self, Reset};
use crate::record::Given;
use crate::usbnode::Options;

impl Daemon {
    /// Gives the broker all inputs that wait, and performs what it asks for.
    pub(super) fn pump(&mut self) {
        while let Some(input) = self.inputs.pop_front() {
            match &input {
                Input::Up(vm, ..) if !self.up.contains(vm) => self.up.push(vm.clone()),
                Input::Down(vm) => self.up.retain(|name| name != vm),
                _ => {}
            }
            let effects = self.broker.step(now(), input);
            let sends = effects.iter().any(|effect| matches!(effect, Effect::Send(..)));
            for effect in &effects {
                if let Effect::Rename(old, new) = effect {
                    self.inventory.rename(*old, *new);
                    self.renamed(*old, *new);
                }
            }
            if let Err(error) = self.write_record() {
                tracing::error!(%error, "cannot write the record of given devices; a restart may replug them");
                if sends {
                    // Goes on: a full disk must not keep keyboards from VMs.
                    tracing::warn!("handing over without a record");
                }
            }
            for effect in effects {
                self.perform(effect);
            }
        }
    }

    /// What is kept by the names of devices.
    fn renamed(&mut self, old: DeviceId, new: DeviceId) {
        for set in [&mut self.reset_due, &mut self.confined_files] {
            if set.remove(&old) {
                set.insert(new);
            }
        }
    }

    fn write_record(&mut self) -> std::io::Result<()> {
        if self.resynced_at.is_none() {
            // The books are empty, but not what the last run gave away: written now, a second crash would forget it.
            return Ok(());
        }
        let given = self.broker.touched().filter_map(|(id, touched)| {
            let present = &self.inventory.get(id)?.present;
            let (plug, facts) = (&present.plug, &present.facts);
            Some(Given {
                id,
                vm: touched.holder().cloned(),
                deauthorized: touched == Touched::Deauthorized,
                syspath: plug.syspath.clone(),
                inode: plug.inode,
                address: plug.address,
                confined: self.confined_files.contains(&id),
                strings: Some((facts.authorized, facts.strings())),
            })
        });
        let given = given.collect();
        self.record.write(given)
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Prepare(id) => match self.inventory.get(id) {
                Some(item) => {
                    let options = item.options();
                    let confine = self.claims_are_kept
                        && !self.ports.is_busy()
                        && self.is_on_claimed_port(&item.present.facts.sys_name);
                    let on_attach =
                        options.is_some_and(|one| matches!(one.reset, Reset::OnAttach | Reset::Both));
                    let options = Options {
                        reset: on_attach || self.reset_due.remove(&id),
                        configuration: options.and_then(|one| one.configuration),
                        confine,
                        authorize: options
                            .is_some_and(|one| one.on_release == schema::OnRelease::Deauthorize)
                            || self.broker.is_deauthorized(id),
                    };
                    if confine {
                        self.confined_files.insert(id);
                    } else {
                        self.confined_files.remove(&id);
                    }
                    self.workers.start(Job::Prepare(id, Box::new(item.present.clone()), options));
                }
                None => self.inputs.push_back(Input::Prepared(id, Err(vanished()))),
            },
            // A driver that looks at a device on a claimed port is turned away.
            Effect::Return(id, how) if self.ports.is_busy() => self.ports.waiting.push((id, how)),
            Effect::Return(id, how) => self.release(id, how),
            Effect::Send(_, link, id) => self.send(link, id),
            Effect::Discard(id) => {
                self.ready.remove(&id);
                self.confined_files.remove(&id);
            }
            Effect::Detach(link, id) => {
                let deadline_ms =
                    u32::try_from(self.broker.detach_deadline().as_millis()).unwrap_or(u32::MAX);
                let inputs = self.instances.send(now(), link, &ToInstance::Detach { id, deadline_ms }, None);
                self.queue(inputs);
            }
            Effect::Rename(..) => {}
            Effect::Resync => self.resync_soon(),
            Effect::Report(event) => self.report(event),
        }
    }

    pub(super) fn release(&mut self, id: DeviceId, how: OnRelease) {
        let reset = how == OnRelease::Host && self.reset_due.remove(&id);
        match self.inventory.get(id) {
            Some(item) => self.workers.start(Job::Release(id, Box::new(item.present.clone()), how, reset)),
            None => self.inputs.push_back(Input::Returned(id, Err(vanished()))),
        }
    }

    fn send(&mut self, link: LinkId, id: DeviceId) {
        let Some(ready) = self.ready.remove(&id) else { return };
        let Some(item) = self.inventory.get(id) else {
            self.inputs.push_back(Input::Refused(link, id, "the device is gone".to_owned()));
            return;
        };
        let facts = &item.present.facts;
        let attach = ToInstance::Attach(Attach {
            id,
            address: facts.address,
            path: facts.chain.clone(),
            speed: facts.speed,
            ids: facts.id,
            configuration: ready.configuration,
            reset: ResetPolicy::default(),
        });
        let inputs = self.instances.send(now(), link, &attach, Some(ready.file.as_fd()));
        // Our copy closes here: a duplicate would keep the device claimed when the instance dies.
        drop(ready);
        self.queue(inputs);
    }

    pub(super) fn finish_jobs(&mut self) {
        let mut has_strings = false;
        for done in self.workers.finished() {
            let input = match done {
                Done::Claimed(claims, outcome) => {
                    self.claimed(claims, outcome);
                    continue;
                }
                Done::Strings(order, strings) => {
                    if strings.is_some() {
                        has_strings = true;
                    } else {
                        // It left while it was read; the last scan still has it.
                        self.resync_soon();
                    }
                    self.strings_arrived(order, strings);
                    continue;
                }
                Done::Revoked(id, result) => {
                    self.cut_off_ended(id, result.map_err(|error| Failure::from(&error).text));
                    continue;
                }
                Done::Prepared(id, Ok(ready)) => {
                    for (interface, driver) in &ready.drivers {
                        tracing::debug!(%id, interface, driver, "host driver detached");
                    }
                    self.ready.insert(id, ready);
                    Input::Prepared(id, Ok(()))
                }
                Done::Prepared(id, Err(error)) => Input::Prepared(id, Err(Failure::from(&error))),
                Done::Released(id, result) => {
                    Input::Returned(id, result.map_err(|error| Failure::from(&error)))
                }
            };
            self.inputs.push_back(input);
        }
        if has_strings {
            self.take_last();
        }
    }

    /// Tells the operator.
    fn report(&mut self, event: Event) {
        let (id, vm, kind, text, actor) = match event {
            Event::Attached(id, vm, port) => {
                self.remember_gift(id, &vm);
                (id, Some(vm), Kind::Attached, format!("guest port {port}"), "policy")
            }
            Event::Adopted(id, vm, port) => {
                self.remember_gift(id, &vm);
                (id, Some(vm), Kind::Adopted, format!("guest port {port}"), "usbvfiod")
            }
            Event::Detached(id, vm, why) => {
                if let Some(gift) = self.gifts.remove(&id) {
                    self.inventory.left(now(), &gift.connector, &gift.vm, &gift.rule);
                    if gift.reset {
                        self.reset_due.insert(id);
                    }
                }
                if self.confined_files.remove(&id) {
                    // The port was kept for this file; perhaps no rule names it any more.
                    self.resync_soon();
                }
                self.given_back(id);
                if let Some(item) = self.inventory.get(id)
                    && let Err(error) = self.orders.left(&item.present.plug)
                {
                    tracing::error!("{:#}", anyhow::Error::from(error));
                }
                (id, Some(vm), Kind::Detached, why.text().to_owned(), "policy")
            }
            Event::Failed(id, vm, text, pause) => {
                if !self.broker.is_given(id) {
                    // Nobody has the file.
                    self.confined_files.remove(&id);
                }
                let text = format!("{text}; next try in {} s", pause.as_secs());
                (id, Some(vm), Kind::Failed, text, "policy")
            }
            Event::Stuck(id, vm) => {
                let text = self.stuck(id, &vm);
                (id, Some(vm), Kind::Stuck, text, "usbvfiod")
            }
            Event::Released(id, how) => {
                let text = match how {
                    OnRelease::Host => "back with the host's drivers",
                    OnRelease::Hold => "kept without drivers",
                    OnRelease::Deauthorize => "deauthorized",
                };
                (id, None, Kind::Released, text.to_owned(), "policy")
            }
            Event::NotReleased(id, text, pause) => {
                let text = format!("not given back: {text}; next try in {} s", pause.as_secs());
                (id, None, Kind::Failed, text, "policy")
            }
            Event::Foreign(id, vm) => {
                let text = format!("claims to hold {id}, which it was not given; told to let go");
                (id, Some(vm), Kind::Foreign, text, "usbvfiod")
            }
        };
        let item = self.inventory.get(id);
        let rule = item.and_then(|item| item.rule()).map(str::to_owned);
        let device = item.map(|item| subject(id, &item.present));
        self.audit.add(Note { event: kind, device, vm, rule, text, actor: actor.to_owned() });
    }

    fn remember_gift(&mut self, id: DeviceId, vm: &common::ids::VmName) {
        if let Some(item) = self.inventory.get(id) {
            let rule = item.rule().unwrap_or_default().to_owned();
            let connector = item.present.facts.connector.clone();
            let reset = item.options().is_some_and(|one| matches!(one.reset, Reset::OnRelease | Reset::Both));
            self.gifts.insert(id, Gift { connector, vm: vm.clone(), rule, reset });
        }
    }

    /// Tells systemd how things are, and that the loop turns.
    pub(super) fn report_status(&mut self) {
        use sd_notify::NotifyState;
        let conflicts = self
            .inventory
            .iter()
            .filter(|(_, item)| matches!(item.verdict, crate::policy::decide::Verdict::Conflict { .. }));
        let degraded = if self.written.is_none() { ", NO POLICY: nothing is handed over" } else { "" };
        let silent = match self.strings.silent() {
            0 => String::new(),
            count => format!(", {count} do not answer yet"),
        };
        let status = format!(
            "{} devices, {} with VMs, {} VMs up, {} conflicts{silent}{degraded}",
            self.inventory.iter().count(),
            self.broker.holders().count(),
            self.up.len(),
            conflicts.count(),
        );
        let mut states = vec![NotifyState::Watchdog];
        if status != self.status {
            tracing::debug!("{status}");
            self.status = status;
            states.push(NotifyState::Status(&self.status));
        }
        let _ = sd_notify::notify(&states);
    }
}

fn vanished() -> Failure {
    Failure { text: "the device is gone".to_owned(), stale: true }
}
