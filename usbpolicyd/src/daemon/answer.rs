//! Answers to `usbpolicyctl`.

use std::time::Duration;

use common::ids::DeviceId;

use super::refresh::{describe, subject};
use super::{Daemon, Mode, now};
use crate::admin::wire::{
    CLASSES_MAX, DeviceView, Lasting, Reply, Request, Service, State, StatusView, UP_MAX, VmView,
};
use crate::admin::{ClientId, Role};
use crate::audit::Kind;
use crate::broker::{self, Input};
use crate::facts::DeviceFacts;
use crate::inventory::Item;
use crate::policy::compile::CompiledPolicy;
use crate::policy::decide::{Context, Order, Verdict, decide};

impl Daemon {
    /// Takes one request and answers it.
    pub(super) fn serve(&mut self, client: ClientId) {
        let Some(request) = self.admin.receive(client) else { return };
        let Some((role, actor)) = self.admin.caller(client) else { return };
        let actor = actor.to_owned();
        let needed = request.role();
        let result = if role >= needed {
            self.answer(client, request, &actor)
        } else {
            let more = if needed == Role::View { "usbpolicy-view, usbpolicy-operate or " } else { "" };
            Err(format!(
                "{actor} may not do that: it needs membership in group {more}{}",
                if needed == Role::View { "usbpolicy-admin" } else { needed.group() }
            ))
        };
        if matches!(result, Ok(None)) {
            return;
        }
        let (ok, text) = match result {
            Ok(text) => (true, text.unwrap_or_default()),
            Err(text) => (false, text),
        };
        self.admin.send(client, &Reply::End { ok, text });
    }

    /// `Ok(None)`: the answer has no end.
    fn answer(&mut self, client: ClientId, request: Request, actor: &str) -> Result<Option<String>, String> {
        let done = |text: String| Ok(Some(text));
        match request {
            Request::List => {
                for view in self.device_views() {
                    self.admin.send(client, &Reply::Device(Box::new(view)));
                }
                done(String::new())
            }
            Request::Vms => {
                for view in self.vm_views() {
                    self.admin.send(client, &Reply::Vm(view));
                }
                done(String::new())
            }
            Request::Status => {
                let view = self.status_view();
                self.admin.send(client, &Reply::Status(view));
                done(String::new())
            }
            Request::Reload => {
                let first = self.audit.last_seq();
                let loaded = self.load_policy(actor);
                let new = self.audit.entries().filter(|entry| entry.seq > first);
                let text = new.map(|entry| entry.text.clone()).collect::<Vec<_>>().join("\n");
                if loaded { done(text) } else { Err(format!("{text}\nthe old policy stays in force")) }
            }
            Request::Log { device } => {
                let entries: Vec<_> = self.audit.entries().cloned().collect();
                for entry in entries {
                    let subject = entry.device.as_ref();
                    let is_it = |wanted: &String| {
                        subject.is_some_and(|device| {
                            [&device.name, &device.connector, &device.ids].contains(&wanted)
                                || device.id.to_string() == *wanted
                        })
                    };
                    if device.as_ref().is_none_or(is_it) {
                        self.admin.send(client, &Reply::Entry(entry));
                    }
                }
                done(String::new())
            }
            Request::Watch => {
                self.admin.watch(client);
                Ok(None)
            }
            Request::Retry { device } => {
                self.may_act()?;
                let id = self.find(&device)?;
                self.inputs.push_back(Input::Retry(id));
                done(format!("trying {device} again"))
            }
            Request::Serve { vm, service } => {
                self.may_act()?;
                if !self.policy.vms.contains_key(&vm) {
                    return Err(format!("the policy has no VM {vm}"));
                }
                let (service, word) = match service {
                    Service::Running => (broker::Service::Running, "running"),
                    Service::Paused => (broker::Service::Paused, "paused"),
                    Service::Drained => (broker::Service::Drained, "drained"),
                };
                self.inputs.push_back(Input::Serve(vm.clone(), service));
                self.note(Kind::Order, None, format!("VM {vm} is {word}"), actor);
                done(format!("VM {vm} is {word}"))
            }
            Request::Attach { device, vm, lasting, steal } => {
                self.may_act()?;
                let id = self.find(&device)?;
                if let Some(holder) = self.broker.holder(id).filter(|holder| **holder != vm && !steal) {
                    return Err(format!("VM {holder} has {device}; --steal takes it from there"));
                }
                let order = Order::Attach { vm, actor: actor.to_owned() };
                self.order(id, order, lasting, actor).map(Some)
            }
            Request::Detach { device, lasting } => {
                self.may_act()?;
                let id = self.find(&device)?;
                self.order(id, Order::Keep { actor: actor.to_owned() }, lasting, actor).map(Some)
            }
            Request::Clear { device } => {
                let result = match &device {
                    Some(device) => {
                        let id = self.find(device)?;
                        let Some(item) = self.inventory.get(id) else {
                            return Err("the device is gone".into());
                        };
                        self.orders.clear(&item.present)
                    }
                    None => self.orders.clear_all(),
                };
                let count = result.map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
                self.judged = None;
                let text = format!("{count} orders taken back; the policy decides");
                self.note(Kind::Order, None, text.clone(), actor);
                done(text)
            }
            Request::Orders => {
                for view in self.orders.views() {
                    self.admin.send(client, &Reply::Order(view));
                }
                done(String::new())
            }
            Request::Revoke { device, lasting } => {
                self.may_act()?;
                let id = self.find(&device)?;
                self.revoke(id, lasting, actor).map(Some)
            }
        }
    }

    /// Nothing is moved while the kernel's command line says so, by nobody.
    fn may_act(&self) -> Result<(), String> {
        match self.mode {
            Mode::Normal => Ok(()),
            mode => Err(format!(
                "nothing is handed over or taken back: usbpolicyd.mode={} is on the kernel's command line; boot without it",
                mode.name()
            )),
        }
    }

    /// Puts an order in force, unless a guard or a deny stands above it.
    pub(super) fn order(
        &mut self,
        id: DeviceId,
        order: Order,
        lasting: Lasting,
        actor: &str,
    ) -> Result<String, String> {
        let Some(item) = self.inventory.get(id) else { return Err("the device is gone".into()) };
        let device = subject(id, &item.present);
        let text = match &order {
            Order::Attach { vm, .. } => {
                let context = Context { order: Some(order.clone()), ..Context::default() };
                let verdict = decide(&self.policy, &item.present.facts, &context);
                if !matches!(verdict, Verdict::Assign { .. }) {
                    return Err(format!("{} stays where it is: {}", device.name, describe(&verdict).1));
                }
                format!("goes to VM {vm}")
            }
            Order::Keep { .. } => "stays with the host".to_owned(),
        };
        let lasts = match lasting {
            Lasting::Once => "this once",
            Lasting::UntilUnplug => "until it is unplugged",
            Lasting::Persist => "until `usbpolicyctl clear`",
        };
        let result = self.orders.give(&item.present, order, lasting);
        result.map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
        self.judged = None;
        let text = format!("{text}, {lasts}");
        let name = device.name.clone();
        self.note(Kind::Order, Some(device), text.clone(), actor);
        Ok(format!("{name} {text}"))
    }

    /// The one device that a text means.
    pub(super) fn find(&self, text: &str) -> Result<DeviceId, String> {
        let fits = |id: DeviceId, item: &Item| {
            let facts = &item.present.facts;
            let connector = &facts.connector;
            facts.sys_name == text
                || id.to_string() == text
                || facts.address.to_string() == text
                || facts.id.to_string() == text
                || facts.serial.as_deref() == Some(text)
                || connector.halves.iter().any(|half| half.to_string() == text)
                || self.policy.connector_name(connector) == Some(text)
        };
        let found: Vec<_> = self.inventory.iter().filter(|(id, item)| fits(*id, item)).collect();
        match found.as_slice() {
            [(id, _)] => Ok(*id),
            [] => Err(format!("no device {text:?} is plugged in; `usbpolicyctl list` shows all")),
            several => {
                let names: Vec<_> =
                    several.iter().map(|(_, item)| item.present.facts.sys_name.as_str()).collect();
                Err(format!("{text:?} fits {} devices: {}; name one of them", names.len(), names.join(", ")))
            }
        }
    }

    fn device_views(&self) -> Vec<DeviceView> {
        let now = now();
        let view = |(id, item): (DeviceId, &Item)| {
            let state =
                self.broker.state(now, id).map_or(State::Starting, |state| state_view(state, item, now));
            let state = match (state, self.mode) {
                (State::Host, Mode::Observe | Mode::Off)
                    if matches!(item.verdict, Verdict::Assign { .. }) =>
                {
                    State::Idle { mode: self.mode.name().to_owned() }
                }
                (state, _) => state,
            };
            let mut view = device_view(&item.present.facts, &self.policy, item.verdict.clone(), state);
            view.id = Some(id);
            view.context = item.context.clone();
            view.context.up.truncate(UP_MAX);
            view.order = self.orders.of(&item.present).map(|order| match order {
                Order::Attach { vm, actor } => format!("to {vm}, by {actor}"),
                Order::Keep { actor } => format!("kept on the host, by {actor}"),
            });
            view
        };
        self.inventory.iter().map(view).collect()
    }

    fn vm_views(&self) -> Vec<VmView> {
        let states: std::collections::BTreeMap<_, _> = self.broker.machines().collect();
        let mut names: Vec<_> = self.policy.vms.keys().chain(states.keys().copied()).collect();
        names.sort_unstable();
        names.dedup();
        let view = |name: &common::ids::VmName| {
            let rules = self.policy.vms.get(name);
            let state = states.get(name);
            VmView {
                name: name.clone(),
                label: rules.and_then(|vm| vm.label.clone()),
                in_policy: rules.is_some(),
                up: state.map_or(Some(false), |state| state.up),
                vmm_connected: self.instances.greeting(name).map(|greeting| greeting.vmm_connected),
                service: match state.map(|state| state.service) {
                    Some(broker::Service::Paused) => Service::Paused,
                    Some(broker::Service::Drained) => Service::Drained,
                    _ => Service::Running,
                },
                devices: state.map_or(0, |state| state.devices),
                missing: self.missing(name),
                max_devices: rules.and_then(|vm| vm.limits.max_devices),
                socket: self.instances.path(name).display().to_string(),
                problem: self.instances.complaint(name).map(str::to_owned),
            }
        };
        names.into_iter().map(view).collect()
    }

    /// The rules with `mode = "required"` by which a VM should have a device and has none.
    fn missing(&self, vm: &common::ids::VmName) -> Vec<String> {
        let needed = self.policy.rules.iter().filter(|rule| {
            rule.options.mode == crate::policy::schema::Mode::Required && rule.vms.contains(vm)
        });
        let has = |rule: &&crate::policy::compile::Rule| {
            self.inventory.iter().any(|(id, item)| {
                rule.matcher.test(&item.present.facts).is_some()
                    && matches!(self.broker.state(now(), id), Some(broker::State::Attached(holder, _)) if holder == *vm)
            })
        };
        needed.filter(|rule| !has(rule)).map(|rule| rule.label.clone()).collect()
    }

    fn status_view(&self) -> StatusView {
        StatusView {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            mode: self.mode.name().to_owned(),
            policy: self.written.is_some(),
            files: self.policy_names.clone(),
            last_seq: self.audit.last_seq(),
            status: self.status.clone(),
            claimed_ports: self.ports.names.clone(),
        }
    }

    /// Sends new audit entries to those who watch.
    pub(super) fn tell_watchers(&mut self) {
        let last = self.audit.last_seq();
        if last == self.told_seq {
            return;
        }
        let told = std::mem::replace(&mut self.told_seq, last);
        let watchers = self.admin.watchers();
        if watchers.is_empty() {
            return;
        }
        let new: Vec<_> = self.audit.entries().filter(|entry| entry.seq > told).cloned().collect();
        for entry in new {
            for client in &watchers {
                self.admin.send(*client, &Reply::Entry(entry.clone()));
            }
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn state_view(state: broker::State, item: &Item, now: Duration) -> State {
    match state {
        broker::State::Host => match item.calm_at.filter(|at| *at > now) {
            Some(at) => State::Flapping { calm_in_ms: millis(at.saturating_sub(now)) },
            None => State::Host,
        },
        broker::State::OnHold => State::OnHold,
        broker::State::Deauthorized => State::Deauthorized,
        broker::State::Attaching(vm) => State::Attaching { vm },
        broker::State::Attached(vm, guest_port) => State::Attached { vm, guest_port },
        broker::State::Detaching(vm) => State::Detaching { vm },
        broker::State::Stuck(vm) => State::Stuck { vm },
        broker::State::Releasing => State::Releasing,
        broker::State::VmDown(vm) => State::VmDown { vm },
        broker::State::VmPaused(vm) => State::VmPaused { vm },
        broker::State::VmFull(vm) => State::VmFull { vm },
        broker::State::Failed(vm, text, pause) => State::Failed { vm, text, retry_in_ms: millis(pause) },
        broker::State::NotReleased(text, pause) => State::NotReleased { text, retry_in_ms: millis(pause) },
        broker::State::Starting => State::Starting,
    }
}

/// What `list` shows of a device.
pub fn device_view(
    facts: &DeviceFacts,
    policy: &CompiledPolicy,
    decision: Verdict,
    state: State,
) -> DeviceView {
    let mut classes: Vec<_> = facts.interfaces.iter().map(|one| one.class).collect();
    classes.sort_unstable();
    classes.dedup();
    classes.truncate(CLASSES_MAX);
    let mut drivers: Vec<_> = facts.interfaces.iter().filter_map(|one| one.driver.clone()).collect();
    drivers.sort_unstable();
    drivers.dedup();
    DeviceView {
        id: None,
        name: facts.sys_name.clone(),
        address: facts.address,
        connector: facts.connector.to_string(),
        connector_name: policy.connector_name(&facts.connector).map(str::to_owned),
        halves: facts.connector.halves.iter().map(ToString::to_string).collect(),
        ids: facts.id,
        manufacturer: facts.manufacturer.clone(),
        product: facts.product.clone(),
        serial: facts.serial.clone(),
        fingerprint: facts.fingerprint().to_string(),
        speed: facts.speed,
        hub: facts.is_hub(),
        classes,
        drivers,
        host_use: facts.host_use.clone(),
        decision,
        state,
        context: Context::default(),
        order: None,
    }
}
