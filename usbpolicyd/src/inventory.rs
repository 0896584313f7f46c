//! What is plugged in, under which name, and what the policy says of it: from a reading of sysfs to the broker's entries.
//! Pure.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use common::ids::{DeviceId, VmName};

use crate::broker::{Entry, OnRelease, Touched};
use crate::guards::{Keyboards, last_keyboard};
use crate::policy::compile::{CompiledPolicy, Options};
use crate::policy::decide::{Context, Verdict, decide};
use crate::policy::schema;
use crate::sysfs::{Plug, Present, Scan};
use crate::topology::{Connector, Topology};

/// Most past plug-ins that are remembered for one connector.
const PLUGINS_MAX: usize = 64;

/// One device that is plugged in.
#[derive(Clone, Debug)]
pub struct Item {
    /// What sysfs says.
    pub present: Present,
    /// What the policy says.
    pub verdict: Verdict,
    /// What else that depended on.
    pub context: Context,
    /// When it was seen first.
    pub since: Duration,
    /// Plugged in and out too often: left alone until then.
    pub calm_at: Option<Duration>,
    /// Whether the host used it at an earlier look.
    was_busy: bool,
    recalled: Option<Touched>,
}

/// What happened at one connector before.
#[derive(Clone, Debug, Default)]
struct Past {
    /// When something was plugged in here, the latest last.
    plugins: VecDeque<Duration>,
    /// Who had the device that was here, by which rule, and when it left.
    last: Option<(VmName, String, Duration)>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Inventory {
    items: BTreeMap<DeviceId, Item>,
    names: BTreeMap<Plug, DeviceId>,
    recalled: BTreeMap<Plug, (DeviceId, Touched)>,
    past: BTreeMap<Connector, Past>,
    topology: Topology,
    keyboards: Keyboards,
    next_id: u64,
}

impl Inventory {
    /// An empty one. New names count up from `first_id`; `recalled` are the names a former run gave.
    pub fn new(first_id: u64, recalled: BTreeMap<Plug, (DeviceId, Touched)>) -> Self {
        Self { next_id: first_id, recalled, ..Self::default() }
    }

    /// Takes a new reading. A plug-in that is still there keeps its name.
    pub fn take(&mut self, now: Duration, scan: Scan, keyboards: Keyboards) {
        self.keyboards = keyboards;
        self.topology = scan.topology;
        let mut old = std::mem::take(&mut self.items);
        let mut names = BTreeMap::new();
        for present in scan.devices {
            let plug = present.plug.clone();
            let known = self.names.get(&plug).and_then(|id| Some((*id, old.remove(id)?)));
            let (id, item) = match known {
                Some((id, item)) => (id, Item { present, ..item }),
                None => self.new_item(now, present),
            };
            names.insert(plug, id);
            self.items.insert(id, item);
        }
        self.names = names;
    }

    fn new_item(&mut self, now: Duration, present: Present) -> (DeviceId, Item) {
        let past = self.past.entry(present.facts.connector.clone()).or_default();
        if past.plugins.len() == PLUGINS_MAX {
            past.plugins.pop_front();
        }
        past.plugins.push_back(now);
        let recalled = self.recalled.remove(&present.plug);
        let id = recalled.as_ref().map_or_else(
            || {
                self.next_id += 1;
                DeviceId(self.next_id)
            },
            |(id, _)| *id,
        );
        let item = Item {
            present,
            verdict: Verdict::Host,
            context: Context::default(),
            since: now,
            calm_at: None,
            was_busy: false,
            recalled: recalled.map(|(_, touched)| touched),
        };
        (id, item)
    }

    /// Asks the policy about every device. `context` tells what the decision depends on besides. Returns the broker's
    /// entries and the devices whose verdict changed.
    pub fn judge(
        &mut self,
        now: Duration,
        policy: &CompiledPolicy,
        context: impl Fn(DeviceId, &Item) -> Context,
    ) -> (Vec<Entry>, Vec<DeviceId>) {
        let mut entries = Vec::with_capacity(self.items.len());
        let claimed = (policy.claimed_connectors(), policy.claimed_subtrees());
        let mut changed = Vec::new();
        let mut keyboards = self.keyboards.other.saturating_add(self.keyboards.usb.len());
        for (id, item) in &mut self.items {
            let facts = &item.present.facts;
            let past = self.past.get(&facts.connector);
            let mut context = context(*id, item);
            context.was_busy = item.was_busy;
            item.was_busy |= !facts.host_use.is_empty();
            if let Some((vm, rule, at)) = past.and_then(|past| past.last.clone()) {
                let follow =
                    policy.rules.iter().find(|one| one.label == rule).and_then(|one| one.options.follow);
                if follow.is_some_and(|span| item.since.saturating_sub(at) <= span) {
                    context.follow = Some((vm.clone(), rule));
                }
                context.last_holder.get_or_insert(vm);
            }
            let mut verdict = decide(policy, facts, &context);
            let takes_keyboard = matches!(verdict, Verdict::Assign { .. })
                && context.holder.is_none()
                && self.keyboards.usb.contains(&item.present.plug.syspath);
            if takes_keyboard && keyboards <= 1 {
                // All others are going already.
                let mut facts = facts.clone();
                facts.host_use.push(last_keyboard());
                verdict = decide(policy, &facts, &context);
            }
            if takes_keyboard && matches!(verdict, Verdict::Assign { .. }) {
                keyboards = keyboards.saturating_sub(1);
            }
            let options =
                if let Verdict::Assign { options, .. } = &verdict { Some(&**options) } else { None };
            let flap = match &verdict {
                Verdict::Assign { vm, options, .. } => {
                    options.flap.or_else(|| policy.vms.get(vm)?.limits.flap).or(policy.defaults.flap)
                }
                _ => None,
            };
            item.calm_at = flap.and_then(|flap| calm_at(past?, flap));
            let calm = item.calm_at.is_none_or(|at| at <= now);
            let want = match &verdict {
                Verdict::Assign { vm, .. } if calm => Some(vm.clone()),
                _ => None,
            };
            let quota = match &verdict {
                Verdict::Assign { rule, options, .. } => options
                    .max_devices
                    .map(|most| (rule.clone(), usize::try_from(most).unwrap_or(usize::MAX))),
                _ => None,
            };
            let on_release = options.map_or(policy.defaults.on_release, |options| options.on_release);
            let is_claimed = claimed.0.iter().any(|one| one.meets(&facts.connector))
                || claimed.1.iter().any(|one| one.is_at_or_above(&facts.connector));
            // The host's drivers get nothing on a claimed port.
            let on_release = match on_release.into() {
                OnRelease::Host if is_claimed => OnRelease::Hold,
                other => other,
            };
            entries.push(Entry {
                id: *id,
                address: facts.address,
                ports: facts.chain.clone(),
                want,
                on_release,
                quota,
                authorized: facts.authorized,
                recalled: item.recalled.clone(),
            });
            item.context = context;
            if verdict != item.verdict {
                item.verdict = verdict;
                changed.push(*id);
            }
        }
        (entries, changed)
    }

    /// A VM no longer has this device: remembered for `follow` and `last-used`.
    pub fn left(&mut self, now: Duration, connector: &Connector, vm: &VmName, rule: &str) {
        let past = self.past.entry(connector.clone()).or_default();
        past.last = Some((vm.clone(), rule.to_owned(), now));
    }

    /// The next moment at which a device that was plugged too often has calmed down.
    pub fn deadline_after(&self, now: Duration) -> Option<Duration> {
        self.items.values().filter_map(|item| item.calm_at).filter(|at| *at > now).min()
    }

    /// A device is known by another name now.
    pub fn rename(&mut self, old: DeviceId, new: DeviceId) {
        if let Some(item) = self.items.remove(&old) {
            self.names.insert(item.present.plug.clone(), new);
            self.items.insert(new, item);
        }
    }

    /// One device.
    pub fn get(&self, id: DeviceId) -> Option<&Item> {
        self.items.get(&id)
    }

    /// The name of a plug-in: as it is now, or as a former run of the daemon called it.
    pub fn id_of(&self, plug: &Plug) -> Option<DeviceId> {
        let recalled = self.recalled.get(plug).map(|(id, _)| *id);
        self.names.get(plug).copied().or(recalled)
    }

    /// All devices, by name.
    pub fn iter(&self) -> impl Iterator<Item = (DeviceId, &Item)> + Clone {
        self.items.iter().map(|(id, item)| (*id, item))
    }

    /// Buses and ports at the last reading.
    pub const fn topology(&self) -> &Topology {
        &self.topology
    }
}

/// When a connector with this past is calm enough again; none when it is.
fn calm_at(past: &Past, flap: schema::Flap) -> Option<Duration> {
    let count = usize::try_from(flap.count).unwrap_or(usize::MAX);
    let nth_last = past.plugins.len().checked_sub(count.checked_add(1)?)?;
    let (first, last) = (past.plugins.get(nth_last)?, past.plugins.back()?);
    // More plug-ins than allowed in the window before the last one: quiet for a whole window after it.
    (last.saturating_sub(*first) <= flap.window).then(|| last.saturating_add(flap.window))
}

impl Item {
    /// The options of the rule that assigns the device.
    pub fn options(&self) -> Option<&Options> {
        match &self.verdict {
            Verdict::Assign { options, .. } => Some(options),
            _ => None,
        }
    }

    /// The rule that decided, if one did.
    pub fn rule(&self) -> Option<&str> {
        match &self.verdict {
            Verdict::Assign { rule, .. }
            | Verdict::Denied { rule, .. }
            | Verdict::Unexpected { rule, .. } => Some(rule),
            _ => None,
        }
    }
}

impl From<schema::OnRelease> for OnRelease {
    fn from(word: schema::OnRelease) -> Self {
        match word {
            schema::OnRelease::Host => Self::Host,
            schema::OnRelease::Hold => Self::Hold,
            schema::OnRelease::Deauthorize => Self::Deauthorize,
        }
    }
}
