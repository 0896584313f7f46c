//! Inputs applied to the books, before anything is done about them.

use super::*;

impl Broker {
    pub(super) fn apply(&mut self, now: Duration, input: Input, out: &mut Vec<Effect>) {
        match input {
            Input::Started(awaited) => {
                for vm in &awaited {
                    self.machine(vm).link = Link::Unknown;
                }
                self.awaited = awaited;
                self.awaited_until = now.saturating_add(START_BARRIER);
            }
            Input::Inventory(entries, limits) => {
                self.limits = limits;
                self.inventory(entries);
            }
            Input::Up(vm, link, holds) => self.up(now, &vm, link, &holds, out),
            Input::Lost(vm, link) => {
                let machine = self.machine(&vm);
                if machine.link == Link::Up(link) {
                    machine.link = Link::Unknown;
                }
            }
            Input::Down(vm) => self.down(&vm, out),
            Input::Prepared(id, result) => self.prepared(now, id, result, out),
            Input::Attached(link, id, guest_port) => self.attached(now, link, id, guest_port, out),
            Input::Refused(link, id, text) => self.refused(now, link, id, text, out),
            Input::Detached(link, id) => self.let_go(now, link, id, None, out),
            Input::Gone(link, id, text) => self.let_go(now, link, id, Some(text), out),
            Input::Unclaimed(id) => {
                if let Some(device) = self.devices.get_mut(&id).filter(|device| device.place == Place::Free) {
                    device.custody = Custody::Ours;
                }
            }
            Input::Returned(id, result) => self.returned(now, id, result, out),
            Input::Serve(vm, service) => self.machine(&vm).service = service,
            Input::Retry(id) => {
                if let Some(device) = self.devices.get_mut(&id) {
                    device.backoff = Backoff::default();
                }
            }
            Input::Tick => {}
        }
    }

    pub(super) fn machine(&mut self, vm: &VmName) -> &mut Machine {
        self.machines.entry(vm.clone()).or_default()
    }

    fn vm_of(&self, link: LinkId) -> Option<VmName> {
        let found = self.machines.iter().find(|(_, machine)| machine.link == Link::Up(link));
        found.map(|(name, _)| name.clone())
    }

    fn inventory(&mut self, entries: Vec<Entry>) {
        for device in self.devices.values_mut() {
            device.present = false;
        }
        for entry in entries {
            if let Some(device) = self.devices.get_mut(&entry.id) {
                device.present = true;
                if entry.want != device.entry.want || entry.authorized && !device.entry.authorized {
                    device.backoff = Backoff::default();
                }
                let on_release = device.entry.on_release;
                device.entry = entry;
                if device.entry.want.is_none() && device.place.holder().is_some() {
                    // The rule that gave it away also said what happens when it comes back.
                    device.entry.on_release = on_release;
                }
                continue;
            }
            let recalled = entry.recalled.as_ref().and_then(Touched::holder).cloned();
            if let Some(vm) = &recalled {
                let awaited = self.awaited.contains(vm);
                let machine = self.machine(vm);
                if machine.link == Link::Down && awaited {
                    machine.link = Link::Unknown;
                }
            }
            // A recalled device whose instance is known to be gone was closed by the kernel; its drivers are off.
            let lives = recalled.as_ref().is_some_and(|vm| self.machine(vm).link == Link::Unknown);
            let custody = match &entry.recalled {
                None => Custody::Host,
                Some(Touched::Taken | Touched::Given(_)) => Custody::Ours,
                Some(Touched::Deauthorized) => Custody::Deauthorized,
            };
            let place = match recalled {
                Some(vm) if lives => Place::Held { vm, guest_port: 0, since: Duration::ZERO },
                _ => Place::Free,
            };
            let device = Device { present: true, place, custody, backoff: Backoff::default(), entry };
            self.devices.insert(device.entry.id, device);
        }
    }

    fn up(&mut self, now: Duration, vm: &VmName, link: LinkId, holds: &[Hold], out: &mut Vec<Effect>) {
        self.awaited.remove(vm);
        self.machine(vm).link = Link::Up(link);
        for hold in holds {
            self.account_hold(now, vm, link, hold, out);
        }
        for (id, device) in &mut self.devices {
            if device.entry.want.as_ref() == Some(vm) {
                device.backoff = Backoff::default();
            }
            if device.place.holder() == Some(vm) && !holds.iter().any(|hold| hold.id == *id) {
                let why = if device.present { Why::LetGo } else { Why::Unplugged };
                out.push(Effect::Report(Event::Detached(*id, vm.clone(), why)));
                device.free();
            }
        }
    }

    /// Enters what an instance says it holds, and tells it to let go of what it cannot have.
    fn account_hold(&mut self, now: Duration, vm: &VmName, link: LinkId, hold: &Hold, out: &mut Vec<Effect>) {
        if !self.devices.contains_key(&hold.id) {
            let same = |device: &Device| {
                device.present
                    && device.place == Place::Free
                    && device.entry.address == hold.address
                    && device.entry.ports == hold.ports
            };
            let found = self.devices.iter().find(|(_, device)| same(device)).map(|(id, _)| *id);
            if let Some(mut device) = found.and_then(|id| self.devices.remove(&id)) {
                out.push(Effect::Rename(device.entry.id, hold.id));
                device.entry.id = hold.id;
                self.devices.insert(hold.id, device);
            }
        }
        let device = self.devices.get_mut(&hold.id);
        match device {
            Some(device) if device.place == Place::Free || device.place.holder() == Some(vm) => {
                out.push(Effect::Report(Event::Adopted(hold.id, vm.clone(), hold.guest_port)));
                let since = if let Place::Held { since, .. } = device.place { since } else { now };
                device.place = Place::Held { vm: vm.clone(), guest_port: hold.guest_port, since };
                device.custody = Custody::Ours;
            }
            _ => {
                out.push(Effect::Report(Event::Foreign(hold.id, vm.clone())));
                out.push(Effect::Detach(link, hold.id));
            }
        }
    }

    fn down(&mut self, vm: &VmName, out: &mut Vec<Effect>) {
        self.awaited.remove(vm);
        self.machine(vm).link = Link::Down;
        for (id, device) in &mut self.devices {
            if device.place.holder() == Some(vm) {
                if !matches!(device.place, Place::Offered { .. }) {
                    out.push(Effect::Report(Event::Detached(*id, vm.clone(), Why::InstanceDown)));
                }
                device.free();
            }
        }
    }

    fn prepared(&mut self, now: Duration, id: DeviceId, result: Result<(), Failure>, out: &mut Vec<Effect>) {
        let Some(device) = self.devices.get(&id) else {
            out.push(Effect::Discard(id));
            return;
        };
        let Place::Preparing { vm } = device.place.clone() else {
            out.push(Effect::Discard(id));
            return;
        };
        let link = self.target(device).filter(|(target, _)| *target == vm).map(|(_, link)| link);
        let Some(device) = self.devices.get_mut(&id) else { return };
        match (result, link) {
            (Ok(()), Some(link)) => {
                out.push(Effect::Send(vm.clone(), link, id));
                device.custody = Custody::Ours;
                device.place = Place::Offered { vm, link, until: now.saturating_add(ATTACH_DEADLINE) };
            }
            (Ok(()), None) => {
                out.push(Effect::Discard(id));
                device.free();
            }
            (Err(failure), _) => {
                device.place = Place::Free;
                if failure.stale {
                    out.push(Effect::Resync);
                }
                let pause = device.backoff.fail(now, failure.text.clone());
                out.push(Effect::Report(Event::Failed(id, vm, failure.text, pause)));
            }
        }
    }

    fn attached(&mut self, now: Duration, link: LinkId, id: DeviceId, guest_port: u8, out: &mut Vec<Effect>) {
        let Some(vm) = self.vm_of(link) else { return };
        let place = self.devices.get(&id).map(|device| device.place.clone());
        match place {
            Some(Place::Offered { link: asked, .. }) if asked == link => {
                out.push(Effect::Report(Event::Attached(id, vm.clone(), guest_port)));
                if let Some(device) = self.devices.get_mut(&id) {
                    device.place = Place::Held { vm, guest_port, since: now };
                }
            }
            // The answer crossed our `Detach`: that one will be answered too.
            Some(Place::Leaving { vm: holder, .. } | Place::Stuck { vm: holder }) if holder == vm => {}
            Some(Place::Held { vm: holder, .. }) if holder == vm => {}
            _ => {
                out.push(Effect::Report(Event::Foreign(id, vm)));
                out.push(Effect::Detach(link, id));
            }
        }
    }

    fn refused(&mut self, now: Duration, link: LinkId, id: DeviceId, text: String, out: &mut Vec<Effect>) {
        let Some(vm) = self.vm_of(link) else { return };
        let Some(device) = self.devices.get_mut(&id) else { return };
        match &device.place {
            Place::Offered { link: asked, .. } if *asked == link => {
                let pause = device.backoff.fail(now, text.clone());
                out.push(Effect::Report(Event::Failed(id, vm, text, pause)));
                device.free();
            }
            // The answer crossed our `Detach`: it never had the device.
            Place::Leaving { vm: holder, .. } | Place::Stuck { vm: holder } if *holder == vm => device.free(),
            _ => {}
        }
    }

    /// The instance of `link` has the device no longer: asked for (`Detached`), or unasked, for the reason in `text`.
    fn let_go(
        &mut self,
        now: Duration,
        link: LinkId,
        id: DeviceId,
        text: Option<String>,
        out: &mut Vec<Effect>,
    ) {
        let Some(vm) = self.vm_of(link) else { return };
        let Some(device) = self.devices.get_mut(&id) else { return };
        if device.place.holder() != Some(&vm) {
            return;
        }
        let why = match &device.place {
            Place::Leaving { why, .. } => *why,
            _ if device.present => Why::LetGo,
            _ => Why::Unplugged,
        };
        if let Place::Held { since, .. } = &device.place
            && now.saturating_sub(*since) >= STEADY_AFTER
        {
            device.backoff = Backoff::default();
        }
        let asked = matches!(device.place, Place::Leaving { .. } | Place::Stuck { .. });
        out.push(Effect::Report(Event::Detached(id, vm, why)));
        device.free();
        if !asked {
            // Without a pause a device that its guest throws out at once would be handed over in a tight circle.
            device.backoff.fail(now, text.unwrap_or_else(|| Why::LetGo.text().to_owned()));
            out.push(Effect::Resync);
        }
    }

    fn returned(&mut self, now: Duration, id: DeviceId, result: Result<(), Failure>, out: &mut Vec<Effect>) {
        let Some(device) = self.devices.get_mut(&id) else { return };
        let Place::Returning { how } = device.place else { return };
        device.place = Place::Free;
        match result {
            Ok(()) => {
                device.custody = match how {
                    OnRelease::Host => Custody::Host,
                    OnRelease::Hold => Custody::Ours,
                    OnRelease::Deauthorize => Custody::Deauthorized,
                };
                device.backoff = Backoff::default();
                out.push(Effect::Report(Event::Released(id, how)));
            }
            Err(failure) => {
                let pause = device.backoff.fail(now, failure.text.clone());
                device.backoff.releasing = true;
                if failure.stale {
                    // It is gone, most of the time.
                    out.push(Effect::Resync);
                } else {
                    out.push(Effect::Report(Event::NotReleased(id, failure.text, pause)));
                }
            }
        }
    }
}

impl Device {
    /// What the next run of this daemon has to know of it. The drivers may be off as soon as preparing started, and
    /// may be back as late as giving back ended.
    pub(super) fn touched(&self) -> Option<Touched> {
        match (&self.place, self.custody) {
            (Place::Free, Custody::Host) => None,
            (Place::Free | Place::Preparing { .. } | Place::Returning { .. }, Custody::Deauthorized) => {
                Some(Touched::Deauthorized)
            }
            (Place::Returning { how: OnRelease::Deauthorize }, _) => Some(Touched::Deauthorized),
            (Place::Free | Place::Preparing { .. } | Place::Returning { .. }, _) => Some(Touched::Taken),
            (
                Place::Offered { vm, .. }
                | Place::Held { vm, .. }
                | Place::Leaving { vm, .. }
                | Place::Stuck { vm },
                _,
            ) => Some(Touched::Given(vm.clone())),
        }
    }

    /// No VM has it any more; the host's drivers are still off.
    pub(super) fn free(&mut self) {
        self.place = Place::Free;
        self.custody = Custody::Ours;
    }
}
