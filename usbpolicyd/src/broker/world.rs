//! A small made-up world around the broker: devices, instances that answer when it pleases them, workers that finish
//! when it pleases them, and a daemon that can die. It checks after each move what must hold at every moment.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::*;

/// Something that can happen next. Devices and VMs are counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Move {
    Plug(usize),
    Pull(usize),
    /// sysfs is read: events came, or the safety timer.
    Read,
    /// The policy changes: this device is for this VM (or nobody) from the next reading on.
    Want(usize, Option<usize>),
    StartVm(usize),
    CrashVm(usize),
    /// The daemon connects and gets `Hello` and `List` answered.
    Dial(usize),
    CutLink(usize),
    /// The instance reads one message; `false` makes it refuse an attach.
    InstanceReads(usize, bool),
    /// The daemon reads one message of this instance.
    DaemonReads(usize),
    /// The instance loses its first device by itself.
    LetGo(usize),
    /// A worker finishes its first job, well or not.
    Job(bool),
    Serve(usize, Service),
    Pass(Duration),
    DaemonDies,
}

#[derive(Clone, Debug)]
enum Packet {
    /// With the open file of this plug-in.
    Attach(DeviceId, usize),
    Detach(DeviceId),
    Attached(DeviceId),
    Refused(DeviceId),
    Detached(DeviceId),
    Gone(DeviceId),
}

#[derive(Clone, Debug, Default)]
struct Instance {
    alive: bool,
    link: Option<LinkId>,
    holds: BTreeMap<DeviceId, usize>,
    inbox: VecDeque<Packet>,
    outbox: VecDeque<Packet>,
}

#[derive(Clone, Debug)]
struct Socket {
    plugged: Option<usize>,
    want: Option<usize>,
}

#[derive(Clone, Debug)]
pub(super) struct World {
    pub(super) broker: Broker,
    pub(super) now: Duration,
    sockets: Vec<Socket>,
    instances: Vec<Instance>,
    /// The daemon's names of plug-ins.
    names: BTreeMap<DeviceId, usize>,
    /// What outlives the daemon: who may have which plug-in, under which name.
    record: BTreeMap<DeviceId, (usize, Touched)>,
    /// Plug-ins without the host's drivers.
    bare: BTreeSet<usize>,
    /// Whether the daemon has read sysfs in this life; before that it leaves the record alone.
    has_read: bool,
    /// Files the daemon keeps between `Prepare` and `Send`.
    kept: BTreeSet<DeviceId>,
    jobs: VecDeque<(DeviceId, Option<OnRelease>)>,
    next_plug: usize,
    next_id: u64,
    next_link: u64,
    pub(super) events: Vec<Event>,
}

/// One socket as a daemon may find it when it starts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    /// Whether what was plugged in is still there.
    pub(super) plugged: bool,
    pub(super) want: Option<usize>,
    /// The VM whose instance holds it, if that one is alive.
    pub(super) holder: Option<usize>,
    /// What the record says. Never another VM than the one that holds it: it is written before each hand-over.
    pub(super) recorded: Option<usize>,
}

pub(super) fn vm(index: usize) -> VmName {
    format!("vm{index}").parse().unwrap()
}

fn index_of(name: &VmName) -> usize {
    name.as_str()[2..].parse().unwrap()
}

impl World {
    pub(super) fn new(sockets: usize, vms: usize) -> Self {
        Self {
            broker: Broker::default(),
            now: Duration::from_secs(1),
            sockets: vec![Socket { plugged: None, want: None }; sockets],
            instances: vec![Instance::default(); vms],
            names: BTreeMap::new(),
            record: BTreeMap::new(),
            bare: BTreeSet::new(),
            has_read: false,
            kept: BTreeSet::new(),
            jobs: VecDeque::new(),
            next_plug: 0,
            next_id: 100,
            next_link: 0,
            events: Vec::new(),
        }
    }

    /// A world in the middle of its life.
    pub(super) fn found(sockets: &[Found], alive: &[bool]) -> Self {
        let mut world = Self::new(sockets.len(), alive.len());
        for (instance, alive) in world.instances.iter_mut().zip(alive) {
            instance.alive = *alive;
        }
        for (plug, found) in sockets.iter().enumerate() {
            let id = DeviceId(50 + plug as u64);
            world.sockets[plug] = Socket { plugged: found.plugged.then_some(plug), want: found.want };
            let holder = found.holder.filter(|at| alive[*at]);
            if let Some(at) = holder {
                world.bare.insert(plug);
                world.instances[at].holds.insert(id, plug);
            }
            let recorded = match (found.recorded, holder) {
                (Some(_), Some(holder)) => Some(holder),
                (recorded, _) => recorded,
            };
            if let Some(at) = recorded {
                world.bare.insert(plug);
                world.record.insert(id, (plug, Touched::Given(vm(at))));
            }
        }
        world.next_plug = sockets.len();
        world
    }

    /// Equal for worlds in which the same can happen from now on.
    pub(super) fn fingerprint(&self) -> u64 {
        use std::hash::{DefaultHasher, Hash as _, Hasher as _};
        let Self { broker, now, sockets, instances, names, record, bare, has_read, kept, jobs, .. } = self;
        let mut hasher = DefaultHasher::new();
        format!("{:?}", (broker, now, sockets, instances, names, record, bare, has_read, kept, jobs))
            .hash(&mut hasher);
        hasher.finish()
    }

    /// The VM whose instance has what is plugged in here.
    pub(super) fn holder(&self, socket: usize) -> Option<usize> {
        let plug = self.sockets[socket].plugged?;
        self.instances.iter().position(|one| one.holds.values().any(|held| *held == plug))
    }

    pub(super) fn id(&self, socket: usize) -> DeviceId {
        let plug = self.sockets[socket].plugged.unwrap();
        *self.names.iter().find(|(_, named)| **named == plug).unwrap().0
    }

    pub(super) fn run(&mut self, moves: impl IntoIterator<Item = Move>) {
        for one in moves {
            self.make(one);
        }
    }

    pub(super) fn make(&mut self, one: Move) {
        match one {
            Move::Plug(socket) => {
                if self.sockets[socket].plugged.is_none() {
                    self.sockets[socket].plugged = Some(self.next_plug);
                    self.next_plug += 1;
                }
            }
            Move::Pull(socket) => self.sockets[socket].plugged = None,
            Move::Read => self.read(),
            Move::Want(socket, want) => self.sockets[socket].want = want,
            Move::StartVm(at) => self.instances[at].alive = true,
            Move::CrashVm(at) => {
                if std::mem::take(&mut self.instances[at]).link.is_some() {
                    self.step(Input::Down(vm(at)));
                }
            }
            Move::Dial(at) => self.dial(at),
            Move::CutLink(at) => {
                if let Some(link) = self.instances[at].link.take() {
                    self.step(Input::Lost(vm(at), link));
                }
            }
            Move::InstanceReads(at, take) => self.instance_reads(at, take),
            Move::DaemonReads(at) => self.daemon_reads(at),
            Move::LetGo(at) => {
                let instance = &mut self.instances[at];
                if let Some((id, _)) = instance.holds.pop_first() {
                    instance.outbox.push_back(Packet::Gone(id));
                }
            }
            Move::Job(ok) => self.finish_job(ok),
            Move::Serve(at, service) => self.step(Input::Serve(vm(at), service)),
            Move::Pass(time) => {
                self.now += time;
                self.step(Input::Tick);
            }
            Move::DaemonDies => self.daemon_dies(),
        }
        self.check();
    }

    fn read(&mut self) {
        let entries = self.entries();
        self.has_read = true;
        self.step(Input::Inventory(entries, BTreeMap::new()));
    }

    fn entries(&mut self) -> Vec<Entry> {
        let mut entries = Vec::new();
        for (index, socket) in self.sockets.iter().enumerate() {
            let Some(plug) = socket.plugged else { continue };
            let known = self.names.iter().find(|(_, named)| **named == plug).map(|(id, _)| *id);
            let recorded = self.record.iter().find(|(_, (recorded, _))| *recorded == plug);
            let id = known.or(recorded.map(|(id, _)| *id)).unwrap_or_else(|| {
                self.next_id += 1;
                DeviceId(self.next_id)
            });
            self.names.insert(id, plug);
            entries.push(Entry {
                id,
                address: BusAddress { bus: 1, device: plug as u32 },
                ports: PortChain::new(&[index as u8 + 1]).unwrap(),
                want: socket.want.map(vm),
                on_release: OnRelease::Host,
                quota: None,
                authorized: true,
                recalled: recorded.map(|(_, (_, touched))| touched.clone()),
            });
        }
        entries
    }

    fn dial(&mut self, at: usize) {
        let instance = &mut self.instances[at];
        if !instance.alive {
            self.step(Input::Down(vm(at)));
            return;
        }
        // An instance serves one connection: what lies unread in the old one is closed with it.
        instance.inbox.clear();
        instance.outbox.clear();
        self.next_link += 1;
        let link = LinkId(self.next_link);
        instance.link = Some(link);
        let sockets = &self.sockets;
        let holds = instance.holds.iter().map(|(id, plug)| {
            let socket = sockets.iter().position(|socket| socket.plugged == Some(*plug)).unwrap_or(40);
            Hold {
                id: *id,
                address: BusAddress { bus: 1, device: *plug as u32 },
                ports: PortChain::new(&[socket as u8 + 1]).unwrap(),
                guest_port: 1,
            }
        });
        let holds = holds.collect();
        self.step(Input::Up(vm(at), link, holds));
    }

    fn instance_reads(&mut self, at: usize, take: bool) {
        let instance = &mut self.instances[at];
        let answer = match instance.inbox.pop_front() {
            Some(Packet::Attach(id, plug)) if take => {
                instance.holds.insert(id, plug);
                Packet::Attached(id)
            }
            Some(Packet::Attach(id, _)) => Packet::Refused(id),
            Some(Packet::Detach(id)) => {
                instance.holds.remove(&id);
                Packet::Detached(id)
            }
            _ => return,
        };
        instance.outbox.push_back(answer);
    }

    fn daemon_reads(&mut self, at: usize) {
        let Some(link) = self.instances[at].link else { return };
        let input = match self.instances[at].outbox.pop_front() {
            Some(Packet::Attached(id)) => Input::Attached(link, id, 1),
            Some(Packet::Refused(id)) => Input::Refused(link, id, "no port".into()),
            Some(Packet::Detached(id)) => Input::Detached(link, id),
            Some(Packet::Gone(id)) => Input::Gone(link, id, "gone".into()),
            _ => return,
        };
        self.step(input);
    }

    fn finish_job(&mut self, ok: bool) {
        let Some((id, job)) = self.jobs.pop_front() else { return };
        let plugged = self.names.get(&id).is_some_and(|plug| self.is_plugged(*plug));
        let result =
            if ok && plugged { Ok(()) } else { Err(Failure { text: "job failed".into(), stale: !plugged }) };
        match job {
            None => {
                if result.is_ok() {
                    self.bare.insert(self.names[&id]);
                    self.kept.insert(id);
                }
                self.step(Input::Prepared(id, result));
            }
            Some(_) => {
                if result.is_ok() {
                    self.bare.remove(&self.names[&id]);
                }
                self.step(Input::Returned(id, result));
            }
        }
    }

    fn daemon_dies(&mut self) {
        // The worst moment of each job: drivers just off, or not yet back.
        for (id, job) in &self.jobs {
            if job.is_none() {
                self.bare.extend(self.names.get(id));
            }
        }
        self.broker = Broker::default();
        self.names.clear();
        self.kept.clear();
        self.jobs.clear();
        for instance in &mut self.instances {
            instance.link = None;
        }
        let sockets = (0..self.instances.len()).filter(|at| self.instances[*at].alive).map(vm).collect();
        self.has_read = false;
        self.step(Input::Started(sockets));
        // A daemon reads sysfs before it talks to anybody.
        self.read();
    }

    fn is_plugged(&self, plug: usize) -> bool {
        self.sockets.iter().any(|socket| socket.plugged == Some(plug))
    }

    fn step(&mut self, input: Input) {
        let effects = self.broker.step(self.now, input);
        // The record is on disk before anything is sent.
        if self.has_read {
            let touched = self.broker.touched();
            self.record = touched.filter_map(|(id, how)| Some((id, (*self.names.get(&id)?, how)))).collect();
        }
        for effect in effects {
            self.perform(effect);
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Prepare(id) => self.jobs.push_back((id, None)),
            Effect::Return(id, how) => self.jobs.push_back((id, Some(how))),
            Effect::Send(name, link, id) => {
                assert!(self.kept.remove(&id), "sent a file that was never opened");
                let plug = self.names[&id];
                let instance = &mut self.instances[index_of(&name)];
                if instance.link == Some(link) {
                    instance.inbox.push_back(Packet::Attach(id, plug));
                }
            }
            Effect::Discard(id) => {
                self.kept.remove(&id);
            }
            Effect::Detach(link, id) => {
                if let Some(instance) = self.instances.iter_mut().find(|one| one.link == Some(link)) {
                    instance.inbox.push_back(Packet::Detach(id));
                }
            }
            Effect::Rename(old, new) => {
                if let Some(plug) = self.names.remove(&old) {
                    self.names.insert(new, plug);
                    if let Some(entry) = self.record.remove(&old) {
                        self.record.insert(new, entry);
                    }
                }
            }
            Effect::Resync => {}
            Effect::Report(event) => self.events.push(event),
        }
    }

    /// What must hold at every moment.
    fn check(&self) {
        for socket in &self.sockets {
            let Some(plug) = socket.plugged else { continue };
            let holds = |instance: &Instance| {
                instance.holds.values().any(|held| *held == plug)
                    || instance
                        .inbox
                        .iter()
                        .any(|one| matches!(one, Packet::Attach(_, sent) if *sent == plug))
            };
            let holders = self.instances.iter().filter(|instance| instance.alive && holds(instance)).count();
            let ours = self.names.iter().any(|(id, named)| *named == plug && self.kept.contains(id));
            assert!(holders + usize::from(ours) <= 1, "two holders of plug-in {plug}: {self:#?}");
        }
    }

    /// Lets everything run to its end, with nothing new happening.
    pub(super) fn calm_down(&mut self) {
        for round in 0..200 {
            self.make(Move::Read);
            for at in 0..self.instances.len() {
                if self.instances[at].link.is_none() {
                    self.make(Move::Dial(at));
                }
                while !self.instances[at].inbox.is_empty() && self.instances[at].link.is_some() {
                    self.make(Move::InstanceReads(at, true));
                }
                while !self.instances[at].outbox.is_empty() && self.instances[at].link.is_some() {
                    self.make(Move::DaemonReads(at));
                }
            }
            while !self.jobs.is_empty() {
                self.make(Move::Job(true));
            }
            if !self.is_calm() {
                continue;
            }
            let Some(deadline) = self.broker.deadline_after(self.now) else { return };
            assert!(round < 199, "never calm: {self:#?}");
            self.now = deadline;
            self.make(Move::Pass(Duration::ZERO));
        }
        panic!("never calm: {self:#?}");
    }

    fn is_calm(&self) -> bool {
        self.jobs.is_empty() && self.instances.iter().all(|one| one.inbox.is_empty() && one.outbox.is_empty())
    }

    /// After [`Self::calm_down`]: everything is where it should be, and one more reading changes nothing.
    pub(super) fn assert_settled(&mut self) {
        for (index, socket) in self.sockets.iter().enumerate() {
            if let Some(plug) = socket.plugged
                && self.holder(index).is_none()
            {
                assert!(!self.bare.contains(&plug), "nobody has it, and no driver: {self:#?}");
            }
            let Some(at) = socket.want.filter(|_| socket.plugged.is_some()) else {
                assert_eq!(self.holder(index), None, "{self:#?}");
                continue;
            };
            let served = |at: usize| {
                let service = self.broker.machines.get(&vm(at)).map(|one| one.service).unwrap_or_default();
                (self.instances[at].alive, service)
            };
            match (self.holder(index), served(at)) {
                (holder, (true, Service::Running)) => assert_eq!(holder, Some(at), "{self:#?}"),
                (holder, (true, Service::Drained) | (false, _)) => assert_eq!(holder, None, "{self:#?}"),
                (_, (true, Service::Paused)) => {}
            }
        }
        let entries = self.entries();
        let now = self.now;
        let again = self.broker.step(now, Input::Inventory(entries, BTreeMap::new()));
        assert_eq!(again, [], "{self:#?}");
    }
}
