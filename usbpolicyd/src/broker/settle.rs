//! From the books to action: deadlines that passed, and the next step of each device.

use super::*;

impl Broker {
    /// The VM a device should go to now, with its connection: wanted, up, and served.
    pub(super) fn target(&self, device: &Device) -> Option<(VmName, LinkId)> {
        let want = device.entry.want.as_ref().filter(|_| device.present)?;
        let machine = self.machines.get(want)?;
        match (machine.link, machine.service) {
            (Link::Up(link), Service::Running) => Some((want.clone(), link)),
            _ => None,
        }
    }

    /// Why a device has to leave the VM that has it, if it has to.
    fn reason_to_leave(&self, device: &Device, vm: &VmName) -> Option<Why> {
        if !device.present {
            return Some(Why::Unplugged);
        }
        if self.machines.get(vm).is_some_and(|machine| machine.service == Service::Drained) {
            return Some(Why::Drained);
        }
        match &device.entry.want {
            None => Some(Why::NotWanted),
            Some(want) if want != vm => Some(Why::Moved),
            Some(_) => None,
        }
    }

    pub(super) fn expire(&mut self, now: Duration, out: &mut Vec<Effect>) {
        if now >= self.awaited_until {
            self.awaited.clear();
        }
        let ids: Vec<DeviceId> = self.devices.keys().copied().collect();
        for id in ids {
            let Some(device) = self.devices.get_mut(&id) else { continue };
            match device.place.clone() {
                Place::Offered { vm, until, .. } if until <= now => {
                    let text = format!("no answer from usbvfiod in {} s", ATTACH_DEADLINE.as_secs());
                    let pause = device.backoff.fail(now, text.clone());
                    out.push(Effect::Report(Event::Failed(id, vm.clone(), text, pause)));
                    self.ask_back(now, id, &vm, Why::NoAnswer, out);
                }
                Place::Leaving { until, .. } if until <= now && !device.present => {
                    // Its files are dead whatever the instance does.
                    self.devices.remove(&id);
                }
                Place::Leaving { vm, until, .. } if until <= now => {
                    out.push(Effect::Report(Event::Stuck(id, vm.clone())));
                    device.place = Place::Stuck { vm };
                }
                _ => {}
            }
        }
    }

    /// Asks the holder for the device, or, while nobody knows whether it lives, waits for that.
    fn ask_back(&mut self, now: Duration, id: DeviceId, vm: &VmName, why: Why, out: &mut Vec<Effect>) {
        let until = now.saturating_add(self.detach_deadline());
        let link = self.machine(vm).link;
        let Some(device) = self.devices.get_mut(&id) else { return };
        if let Link::Up(link) = link {
            out.push(Effect::Detach(link, id));
            device.place = Place::Leaving { vm: vm.clone(), until, why };
        } else {
            device.place = Place::Held { vm: vm.clone(), guest_port: 0, since: now };
        }
    }

    pub(super) fn settle(&mut self, now: Duration, out: &mut Vec<Effect>) {
        let ids: Vec<DeviceId> = self.devices.keys().copied().collect();
        for id in ids {
            let Some(device) = self.devices.get(&id) else { continue };
            match &device.place {
                Place::Free if !device.present => {
                    self.devices.remove(&id);
                }
                Place::Free => self.settle_free(now, id, out),
                Place::Offered { vm, .. } | Place::Held { vm, .. } => {
                    let vm = vm.clone();
                    let link = self.machines.get(&vm).map(|machine| machine.link);
                    let why = self.reason_to_leave(device, &vm);
                    match (link, why) {
                        (Some(Link::Up(_)), Some(why)) => self.ask_back(now, id, &vm, why, out),
                        // Nobody answers for a device that is gone: its files are dead.
                        (_, Some(Why::Unplugged)) => {
                            out.push(Effect::Report(Event::Detached(id, vm, Why::Unplugged)));
                            self.devices.remove(&id);
                        }
                        _ => {}
                    }
                }
                Place::Stuck { .. } if !device.present => {
                    self.devices.remove(&id);
                }
                Place::Preparing { .. }
                | Place::Leaving { .. }
                | Place::Stuck { .. }
                | Place::Returning { .. } => {}
            }
        }
    }

    fn settle_free(&mut self, now: Duration, id: DeviceId, out: &mut Vec<Effect>) {
        let Some(device) = self.devices.get(&id) else { return };
        let waits = device.backoff.failures > 0 && device.backoff.until > now;
        let target = self.target(device).map(|(vm, _)| vm);
        match target {
            Some(vm) => {
                if waits || !self.awaited.is_empty() || self.is_full(&vm) || self.is_used_up(device) {
                    return;
                }
                out.push(Effect::Prepare(id));
                if let Some(device) = self.devices.get_mut(&id) {
                    device.place = Place::Preparing { vm };
                }
            }
            None => {
                let how = match (device.custody, device.entry.on_release) {
                    (Custody::Ours, how @ (OnRelease::Host | OnRelease::Deauthorize)) => how,
                    (Custody::Deauthorized, OnRelease::Host) => OnRelease::Host,
                    _ => return,
                };
                if waits {
                    return;
                }
                out.push(Effect::Return(id, how));
                if let Some(device) = self.devices.get_mut(&id) {
                    device.place = Place::Returning { how };
                }
            }
        }
    }

    /// Whether the rule that assigns the device has as many as it may have.
    fn is_used_up(&self, device: &Device) -> bool {
        let Some((rule, most)) = &device.entry.quota else { return false };
        let by_rule = |other: &&Device| {
            other.entry.quota.as_ref().is_some_and(|(label, _)| label == rule)
                && other.place.counts_for().is_some()
        };
        self.devices.values().filter(by_rule).count() >= *most
    }

    fn is_full(&self, vm: &VmName) -> bool {
        let Some(limit) = self.limits.get(vm) else { return false };
        self.devices.values().filter(|device| device.place.counts_for() == Some(vm)).count() >= *limit
    }
}
