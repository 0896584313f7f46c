//! Turns a policy into the form that decisions are made with: names resolved, places made connectors, rules indexed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use common::ids::VmName;
use serde::{Deserialize, Serialize};

use super::condition::{Condition, Place, Specificity, Where};
use super::pattern::{Glob, IdPattern, Letters};
use super::problem::Origin;
use super::schema::{
    AssignRule, Defaults, Expect, Flap, InUse, Interfaces, Limits, Match, Mode, OnConflict, OnRelease,
    PlaceRef, Policy, Protect, Reset, Revoke, VmDef,
};
use crate::facts::{DeviceFacts, HostUseKind};
use crate::topology::{Connector, PortAddress, Topology};

/// A conjunction: all conditions hold and no `not` does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clause {
    /// The tests, cheap ones first.
    pub conditions: Vec<Condition>,
    /// What must not hold.
    pub nots: Vec<Clause>,
    /// The name in `[devices]` and the id in its `also` that this clause stands for; empty for the match itself.
    pub stands_for: String,
}

impl Clause {
    /// None when the device does not fit, otherwise how specific the clause is about it.
    pub fn test(&self, device: &DeviceFacts) -> Option<Specificity> {
        let mut specificity = Specificity::default();
        for condition in &self.conditions {
            specificity = specificity.with(condition.test(device)?);
        }
        if !self.nots.is_empty() {
            if self.nots.iter().any(|not| not.test(device).is_some()) {
                return None;
            }
            specificity = specificity.with(Specificity::PROPERTY);
        }
        Some(specificity)
    }
}

/// Some clauses, one of which must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Matcher {
    /// The clauses.
    pub clauses: Vec<Clause>,
}

impl Matcher {
    /// None when the device does not fit, otherwise the most specific that a clause is about it.
    pub fn test(&self, device: &DeviceFacts) -> Option<Specificity> {
        self.clauses.iter().filter_map(|clause| clause.test(device)).max()
    }
}

/// What comes with a device that a rule assigns: everything about it that `decide` does not need itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// See [`Mode`].
    pub mode: Mode,
    /// See [`OnRelease`].
    pub on_release: OnRelease,
    /// See [`Reset`].
    pub reset: Reset,
    /// Configuration to set on an unconfigured device; none for the kernel's choice.
    pub configuration: Option<u8>,
    /// How long the VM keeps its claim while the device re-enumerates.
    pub follow: Option<Duration>,
    /// When to leave the device alone; none if the VM's limits or the defaults say so.
    pub flap: Option<Flap>,
    /// How many devices this rule may attach at once.
    pub max_devices: Option<u32>,
}

/// A rule of `[[assign]]`.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Its name, or file and line.
    pub label: String,
    /// Where it stands.
    pub origin: Origin,
    /// The VMs that may have the device, sorted.
    pub vms: Vec<VmName>,
    /// What it is about.
    pub matcher: Matcher,
    /// Before all specificity.
    pub priority: i32,
    /// Whether it may take the device from another VM.
    pub preempt: bool,
    /// What happens to equal claims.
    pub on_conflict: OnConflict,
    /// What else a device must be.
    pub expect: Expect,
    /// Uses by the host that do not keep the device there.
    pub allow_in_use: Vec<HostUseKind>,
    /// Whether the rule names its device (`device = …`), so that it may take even a protected one.
    pub names_device: bool,
    /// What comes with the device.
    pub options: Options,
    /// Whether its connectors are kept from the host's drivers.
    pub claim_ports: bool,
}

/// A rule of `[[deny]]`.
#[derive(Clone, Debug)]
pub struct Deny {
    /// Its name, or file and line.
    pub label: String,
    /// Where it stands.
    pub origin: Origin,
    /// For people.
    pub reason: Option<String>,
    /// What it is about.
    pub matcher: Matcher,
}

/// A VM of the policy.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Where it stands.
    pub origin: Origin,
    /// For people.
    pub label: Option<String>,
    /// Where its usbvfiod listens, when not at the usual path.
    pub socket: Option<String>,
    /// 0 to 100.
    pub trust: u8,
    /// Its limits.
    pub limits: Limits,
    /// What never goes to it.
    pub deny: Matcher,
}

/// A policy that answers.
#[derive(Clone, Debug, Default)]
pub struct CompiledPolicy {
    /// All assign rules, in an order that their content alone decides.
    pub rules: Vec<Rule>,
    /// All deny rules, likewise.
    pub denies: Vec<Deny>,
    /// What stays with the host.
    pub keep_on_host: Matcher,
    /// What happens when the host stops using a busy device.
    pub in_use: InUseRule,
    /// The VMs.
    pub vms: BTreeMap<VmName, Vm>,
    /// How a device is taken from an instance that does not answer.
    pub revoke: Revoke,
    /// What rules have that do not say otherwise; an operator's order has it too.
    pub defaults: Defaults,
    /// Labels of connectors, for people.
    pub connector_names: Vec<(String, Place)>,
    index: Index,
}

/// [`InUse`] with its default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InUseRule(pub InUse);

impl Default for InUseRule {
    fn default() -> Self {
        Self(InUse::Wait)
    }
}

/// Which rules can be about a device at all.
#[derive(Clone, Debug, Default)]
struct Index {
    by_id: HashMap<(u16, u16), Vec<usize>>,
    by_vendor: HashMap<u16, Vec<usize>>,
    by_port: HashMap<PortAddress, Vec<usize>>,
    by_subtree: HashMap<PortAddress, Vec<usize>>,
    by_text: Vec<NeedsText>,
    others: Vec<usize>,
}

/// A rule that asks for a string of the device.
#[derive(Clone, Copy, Debug)]
struct NeedsText {
    key: TextKey,
    /// What the string has to have.
    letters: Letters,
    rule: usize,
}

/// One of the strings of a device.
#[derive(Clone, Copy, Debug)]
enum TextKey {
    Serial,
    Product,
    Manufacturer,
}

impl NeedsText {
    /// The need of one condition, if it has one: what all its globs need.
    fn of(condition: &Condition, rule: usize) -> Option<Self> {
        let (key, globs) = match condition {
            Condition::Serial(globs) => (TextKey::Serial, globs),
            Condition::Product(globs) => (TextKey::Product, globs),
            Condition::Manufacturer(globs) => (TextKey::Manufacturer, globs),
            _ => return None,
        };
        let letters = globs.iter().map(Glob::letters).reduce(Letters::common)?;
        Some(Self { key, letters, rule })
    }
}

/// Resolves a policy for a host. Compile again when the host's ports change.
pub fn compile(policy: &Policy, topology: &Topology) -> CompiledPolicy {
    let resolve = Resolve { policy, topology };
    let mut rules: Vec<(&AssignRule, Rule)> =
        policy.assign.iter().map(|rule| (rule, resolve.rule(rule))).collect();
    rules.sort_by(|(a, _), (b, _)| assign_key(a).cmp(&assign_key(b)));
    let mut rules: Vec<Rule> = rules.into_iter().map(|(_, rule)| rule).collect();
    unique_labels(rules.iter_mut().map(|rule| (&mut rule.label, &rule.origin)));
    let mut denies: Vec<_> = policy.deny.iter().collect();
    denies.sort_by(|a, b| (&a.name, &a.matches, &a.reason).cmp(&(&b.name, &b.matches, &b.reason)));
    let denies = denies.into_iter().map(|deny| Deny {
        label: label(deny.name.as_deref(), &deny.origin),
        origin: deny.origin.clone(),
        reason: deny.reason.clone(),
        matcher: resolve.matcher(&deny.matches),
    });
    let named = |(name, _): (&String, _)| {
        resolve.place(&PlaceRef::Named(name.clone())).map(|one| (name.clone(), one))
    };
    let Protect { keep_on_host, in_use } = &policy.protect;
    CompiledPolicy {
        index: Index::new(&rules),
        denies: denies.collect(),
        keep_on_host: resolve.any_of(keep_on_host),
        in_use: InUseRule(*in_use),
        vms: policy.vms.iter().map(|(name, vm)| (name.clone(), resolve.vm(vm))).collect(),
        revoke: policy.revoke.clone(),
        defaults: policy.defaults.clone(),
        connector_names: policy
            .connectors
            .iter()
            .filter_map(|(name, def)| named((name, def)))
            .flat_map(|(name, places)| places.into_iter().map(move |place| (name.clone(), place)))
            .collect(),
        rules,
    }
}

/// Sorts by what a rule says, never by where it stands.
fn assign_key(rule: &AssignRule) -> impl Ord + '_ {
    (
        (&rule.name, &rule.vms, &rule.matches, rule.priority, rule.preempt),
        (rule.mode, rule.on_conflict, rule.on_release, rule.reset, rule.claim_ports, rule.configuration),
        (rule.follow, &rule.expect, &rule.allow_in_use, rule.limits),
    )
}

/// Unnamed rules of files with the same name get the whole path.
fn unique_labels<'a>(rules: impl Iterator<Item = (&'a mut String, &'a Origin)>) {
    let mut seen = BTreeSet::new();
    for (label, origin) in rules {
        if !seen.insert(label.clone()) {
            *label = origin.to_string();
        }
    }
}

fn label(name: Option<&str>, origin: &Origin) -> String {
    match name {
        Some(name) => name.to_owned(),
        None => format!("{}:{}", origin.file.rsplit('/').next().unwrap_or(""), origin.line),
    }
}

impl CompiledPolicy {
    /// Indices of the rules that can be about a device, in order. The others are certainly not.
    pub(super) fn candidates(&self, device: &DeviceFacts) -> Vec<usize> {
        let mut found = self.index.others.clone();
        found.extend(self.index.by_id.get(&(device.id.vendor, device.id.product)).into_iter().flatten());
        found.extend(self.index.by_vendor.get(&device.id.vendor).into_iter().flatten());
        for port in &device.connector.halves {
            found.extend(self.index.by_port.get(port).into_iter().flatten());
            let mut above = (!self.index.by_subtree.is_empty()).then(|| port.clone());
            while let Some(port) = above {
                found.extend(self.index.by_subtree.get(&port).into_iter().flatten());
                above = port.parent();
            }
        }
        if !self.index.by_text.is_empty() {
            let letters = |text: &Option<String>| text.as_deref().map(Letters::of);
            let (serial, product) = (letters(&device.serial), letters(&device.product));
            let manufacturer = letters(&device.manufacturer);
            let fits = |need: &&NeedsText| {
                let has = match need.key {
                    TextKey::Serial => serial,
                    TextKey::Product => product,
                    TextKey::Manufacturer => manufacturer,
                };
                has.is_some_and(|has| has.contains(need.letters))
            };
            found.extend(self.index.by_text.iter().filter(fits).map(|need| need.rule));
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Connectors to keep from the host's drivers: those that assign rules with `claim_ports` name as one port, minus
    /// those where a rule names only a subtree (its hub belongs to the host).
    pub fn claimed_connectors(&self) -> BTreeSet<Connector> {
        let clauses =
            self.rules.iter().filter(|rule| rule.claim_ports).flat_map(|rule| &rule.matcher.clauses);
        let mut claimed = BTreeSet::new();
        for condition in clauses.flat_map(|clause| &clause.conditions) {
            let Condition::At(places) = condition else { continue };
            for place in places.iter().filter(|place| !place.subtree) {
                if let Where::Connector { connector, .. } = &place.at {
                    claimed.insert(connector.clone());
                }
            }
        }
        claimed
    }

    /// Subtrees that assign rules with `claim_ports` name: the ports of each hub below them are to be kept from the
    /// host's drivers, as well as the port itself as long as no hub is in it.
    pub fn claimed_subtrees(&self) -> BTreeSet<Connector> {
        let clauses =
            self.rules.iter().filter(|rule| rule.claim_ports).flat_map(|rule| &rule.matcher.clauses);
        let mut claimed = BTreeSet::new();
        for condition in clauses.flat_map(|clause| &clause.conditions) {
            let Condition::At(places) = condition else { continue };
            for place in places.iter().filter(|place| place.subtree) {
                if let Where::Connector { connector, .. } = &place.at {
                    claimed.insert(connector.clone());
                }
            }
        }
        claimed
    }

    /// The operator's name for a connector, if `[connectors]` has one for exactly it.
    pub fn connector_name(&self, connector: &Connector) -> Option<&str> {
        let is_it = |place: &Place| matches!(&place.at, Where::Connector { connector: one, .. } if one.meets(connector));
        self.connector_names.iter().find(|(_, place)| is_it(place)).map(|(name, _)| name.as_str())
    }
}

impl Index {
    fn new(rules: &[Rule]) -> Self {
        let mut index = Self::default();
        for (number, rule) in rules.iter().enumerate() {
            for clause in &rule.matcher.clauses {
                index.add(number, clause);
            }
        }
        index
    }

    /// Files a clause under the narrowest key it has.
    fn add(&mut self, rule: usize, clause: &Clause) {
        let exact_ids = |ids: &[IdPattern]| {
            ids.iter().map(|id| Some((id.vendor?, id.product?))).collect::<Option<Vec<_>>>()
        };
        let vendors = |ids: &[IdPattern]| ids.iter().map(|id| id.vendor).collect::<Option<Vec<_>>>();
        let ids = clause
            .conditions
            .iter()
            .filter_map(|one| if let Condition::Id(ids) = one { Some(ids) } else { None });
        let ports = clause
            .conditions
            .iter()
            .find_map(|one| if let Condition::At(places) = one { all_ports(places) } else { None });
        if let Some(exact) = ids.clone().find_map(|ids| exact_ids(ids)) {
            exact.into_iter().for_each(|id| self.by_id.entry(id).or_default().push(rule));
        } else if let Some(ports) = ports {
            for (port, subtree) in ports {
                let map = if subtree { &mut self.by_subtree } else { &mut self.by_port };
                map.entry(port).or_default().push(rule);
            }
        } else if let Some(vendors) = ids.clone().find_map(|ids| vendors(ids)) {
            vendors.into_iter().for_each(|vendor| self.by_vendor.entry(vendor).or_default().push(rule));
        } else if let Some(need) = clause.conditions.iter().find_map(|one| NeedsText::of(one, rule)) {
            self.by_text.push(need);
        } else {
            self.others.push(rule);
        }
    }
}

/// All ports of some places and whether what is below them is meant, if the ports are known.
fn all_ports(places: &[Place]) -> Option<Vec<(PortAddress, bool)>> {
    let mut ports = Vec::new();
    for place in places {
        let Where::Connector { connector, .. } = &place.at else { return None };
        ports.extend(connector.halves.iter().map(|half| (half.clone(), place.subtree)));
    }
    Some(ports)
}

struct Resolve<'a> {
    policy: &'a Policy,
    topology: &'a Topology,
}

impl Resolve<'_> {
    fn rule(&self, rule: &AssignRule) -> Rule {
        let defaults = &self.policy.defaults;
        Rule {
            label: label(rule.name.as_deref(), &rule.origin),
            origin: rule.origin.clone(),
            vms: rule.vms.clone(),
            matcher: self.matcher(&rule.matches),
            priority: rule.priority,
            preempt: rule.preempt,
            on_conflict: rule.on_conflict.unwrap_or(defaults.on_conflict),
            expect: rule.expect.clone(),
            allow_in_use: rule.allow_in_use.clone(),
            names_device: !rule.matches.device.is_empty(),
            options: Options {
                mode: rule.mode.unwrap_or(defaults.mode),
                on_release: rule.on_release.unwrap_or(defaults.on_release),
                reset: rule.reset.unwrap_or(defaults.reset),
                configuration: rule.configuration,
                follow: rule.follow.or(defaults.follow),
                flap: rule.limits.flap,
                max_devices: rule.limits.max_devices,
            },
            claim_ports: rule.claim_ports.unwrap_or(defaults.claim_ports),
        }
    }

    fn vm(&self, vm: &VmDef) -> Vm {
        Vm {
            origin: vm.origin.clone(),
            label: vm.label.clone(),
            socket: vm.socket.clone(),
            trust: vm.trust,
            limits: vm.limits,
            deny: self.any_of(&vm.deny),
        }
    }

    fn any_of(&self, matches: &[Match]) -> Matcher {
        Matcher { clauses: matches.iter().flat_map(|one| self.matcher(one).clauses).collect() }
    }

    /// A named device stands for several clauses: itself and each of its other ids.
    fn matcher(&self, matches: &Match) -> Matcher {
        if matches.device.is_empty() {
            return Matcher { clauses: vec![self.clause(matches)] };
        }
        let mut clauses = Vec::new();
        for name in &matches.device {
            let Some(device) = self.policy.devices.get(name) else { continue };
            clauses.push(self.joined(matches, &device.matches, name.clone()));
            for id in &device.also {
                let other = in_other_state(&device.matches, *id);
                clauses.push(self.joined(matches, &other, format!("{name}, also {id}")));
            }
        }
        Matcher { clauses }
    }

    fn joined(&self, matches: &Match, device: &Match, stands_for: String) -> Clause {
        let mut clause = self.clause(device);
        let own = self.clause(matches);
        clause.conditions.extend(own.conditions);
        clause.conditions.sort_by_key(cost);
        clause.nots.extend(own.nots);
        clause.stands_for = stands_for;
        clause
    }

    fn clause(&self, matches: &Match) -> Clause {
        let Interfaces { any, all, only, none, exactly } = &matches.interfaces;
        let places = matches.at.iter().filter_map(|place| self.place(place)).flatten().collect();
        let mut conditions = Vec::new();
        push(&mut conditions, &matches.id, Condition::Id);
        if !matches.at.is_empty() {
            conditions.push(Condition::At(places));
        }
        push(&mut conditions, &matches.controller, Condition::Controller);
        push(&mut conditions, &matches.depth, Condition::Depth);
        push(&mut conditions, &matches.speed, Condition::Speed);
        push(&mut conditions, &matches.removable, Condition::Removable);
        push(&mut conditions, &matches.connect_type, Condition::ConnectType);
        push(&mut conditions, &matches.class, Condition::Class);
        push(&mut conditions, any, Condition::AnyInterface);
        push(&mut conditions, all, Condition::AllInterfaces);
        push(&mut conditions, only, Condition::OnlyInterfaces);
        push(&mut conditions, none, Condition::NoInterface);
        push(&mut conditions, exactly, Condition::ExactlyInterfaces);
        push(&mut conditions, &matches.serial, Condition::Serial);
        push(&mut conditions, &matches.product, Condition::Product);
        push(&mut conditions, &matches.manufacturer, Condition::Manufacturer);
        push(&mut conditions, &matches.fingerprint, Condition::Fingerprint);
        conditions.sort_by_key(cost);
        Clause { conditions, nots: self.any_of(&matches.not).clauses, stands_for: String::new() }
    }

    /// The ports that a place means; none for a name that is not declared.
    fn place(&self, place: &PlaceRef) -> Option<Vec<Place>> {
        let at = match place {
            PlaceRef::Port(port) => self.connector(port),
            PlaceRef::Kernel(name) | PlaceRef::Eve(name) => match self.topology.port_of(name) {
                Some(port) => self.connector(&port),
                None => Where::Kernel(name.clone()),
            },
            PlaceRef::Named(name) => {
                let def = self.policy.connectors.get(name)?;
                let ports = def.at.iter().filter(|one| !matches!(one, PlaceRef::Named(_)));
                let named = |one: Place| Place { subtree: def.subtree, text: name.clone(), ..one };
                return Some(ports.filter_map(|one| self.place(one)).flatten().map(named).collect());
            }
        };
        Some(vec![Place { at, subtree: false, text: place.to_string() }])
    }

    fn connector(&self, port: &PortAddress) -> Where {
        let connector = self.topology.connector(port);
        let complete = connector.halves.len() > 1 || self.topology.ports.contains_key(port);
        Where::Connector { connector, complete }
    }
}

fn push<T: Clone>(conditions: &mut Vec<Condition>, values: &[T], make: fn(Vec<T>) -> Condition) {
    if !values.is_empty() {
        conditions.push(make(values.to_vec()));
    }
}

/// The same thing in another state: it keeps its place, but nothing it says of itself.
fn in_other_state(matches: &Match, id: IdPattern) -> Match {
    Match {
        id: vec![id],
        at: matches.at.clone(),
        controller: matches.controller.clone(),
        depth: matches.depth.clone(),
        removable: matches.removable.clone(),
        connect_type: matches.connect_type.clone(),
        ..Match::default()
    }
}

/// Cheap and telling tests come first.
fn cost(condition: &Condition) -> u8 {
    match condition {
        Condition::Id(_) => 0,
        Condition::Speed(_) | Condition::Removable(_) | Condition::ConnectType(_) | Condition::Depth(_) => 1,
        Condition::At(_) | Condition::Controller(_) | Condition::Class(_) => 2,
        Condition::Serial(_) | Condition::Product(_) | Condition::Manufacturer(_) => 4,
        Condition::Fingerprint(_) => 5,
        _ => 3,
    }
}
