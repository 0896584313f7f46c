//! The whole of `usbpolicyctl check` for a policy that loads: the proofs of `check` and a look at each table.

use std::collections::BTreeSet;

use super::check::{equal_rules, pieces, ties, unreachable};
use super::compile::{Clause, Rule, compile};
use super::condition::{Condition, Specificity};
use super::overlap::can_meet;
use super::pattern::ClassSet;
use super::problem::{Origin, Problem, Severity};
use super::schema::{Match, Mode, PlaceRef, Policy};
use crate::facts::HostUseKind;
use crate::topology::{PortAddress, Topology};

/// From this trust on, a VM deserves rules that a lying device cannot satisfy.
const TRUSTED: u8 = 50;

/// What a device can do harm with in a trusted VM.
const HARMFUL: &[&str] = &["hid.keyboard", "cdc", "wireless"];

/// Looks at a policy. Without a topology, nothing is said about which ports exist, and ports of different halves of a
/// controller count as possibly one socket.
pub fn lint(policy: &Policy, topology: Option<&Topology>) -> Vec<Problem> {
    let none = Topology::default();
    let compiled = compile(policy, topology.unwrap_or(&none));
    let mut problems = Vec::new();
    let all = pieces(&compiled);
    ties(&compiled, &all, &mut problems);
    unreachable(&compiled, &all, &mut problems);
    equal_rules(&all, &mut problems);
    for rule in &compiled.rules {
        let trust =
            rule.vms.iter().filter_map(|vm| compiled.vms.get(vm)).map(|vm| vm.trust).max().unwrap_or(0);
        weak(rule, trust, &mut problems);
        in_use_without_name(rule, &mut problems);
    }
    places(policy, topology, &mut problems);
    unused(policy, &mut problems);
    problems.sort_by(|a, b| (&a.origin, a.code, &a.message).cmp(&(&b.origin, b.code, &b.message)));
    problems
}

/// Matches that a device can satisfy by what it says of itself.
fn weak(rule: &Rule, trust: u8, problems: &mut Vec<Problem>) {
    if rule.options.mode == Mode::Manual {
        return;
    }
    let is_placed = |clause: &&Clause| {
        clause.conditions.iter().any(|one| matches!(one, Condition::At(_) | Condition::Controller(_)))
    };
    let Some(clause) = rule.matcher.clauses.iter().find(|clause| !is_placed(clause)) else { return };
    let highest = clause.conditions.iter().flat_map(Condition::possible).max().unwrap_or_default();
    if highest <= Specificity::PROPERTY {
        let message = format!("rule {} takes any device that describes itself so, in any port", rule.label);
        let by_name = |one: &Condition| matches!(one, Condition::Product(_) | Condition::Manufacturer(_));
        let severity = if clause.conditions.iter().any(by_name) { Severity::Warning } else { Severity::Note };
        let problem = Problem::new(severity, "weak-selector", message).at(&rule.origin);
        problems.push(problem.help("add at, controller or id, or mode = \"manual\""));
    } else if trust >= TRUSTED && highest < Specificity::UNIT {
        let harmful: Vec<&str> = HARMFUL.iter().copied().filter(|class| may_bring(clause, class)).collect();
        if harmful.is_empty() {
            return;
        }
        let message = format!(
            "rule {} trusts what a device says of itself: in any port, one with that id may bring {} to a VM of trust {trust}",
            rule.label,
            harmful.join(", ")
        );
        let help = format!("add at, or interfaces.none = {harmful:?}");
        problems.push(Problem::new(Severity::Warning, "weak-selector", message).at(&rule.origin).help(help));
    }
}

fn may_bring(clause: &Clause, class: &str) -> bool {
    let Ok(set) = class.parse::<ClassSet>() else { return false };
    let brings = Clause { conditions: vec![Condition::AnyInterface(vec![set])], ..Clause::default() };
    can_meet(&[clause, &brings])
}

/// `allow_in_use` for something that only a rule with `device` may take.
fn in_use_without_name(rule: &Rule, problems: &mut Vec<Problem>) {
    let guarded = |kind: &&HostUseKind| {
        !matches!(kind, HostUseKind::StorageUnmounted | HostUseKind::NetDown | HostUseKind::Open)
    };
    let kinds: Vec<&str> = rule.allow_in_use.iter().filter(guarded).map(|kind| kind.as_str()).collect();
    if !kinds.is_empty() && !rule.names_device {
        let message = format!(
            "rule {} cannot take a device in use as {}: it does not name it",
            rule.label,
            kinds.join(", ")
        );
        let problem = Problem::new(Severity::Warning, "allow-in-use", message).at(&rule.origin);
        problems.push(problem.help("declare the device in [devices] and match it with device = \"name\""));
    }
}

/// All places in a policy, with where they stand.
fn all_places(policy: &Policy) -> Vec<(&PlaceRef, &Origin)> {
    let mut found: Vec<(&PlaceRef, &Origin)> = Vec::new();
    for def in policy.connectors.values() {
        found.extend(def.at.iter().map(|place| (place, &def.origin)));
    }
    for (matches, origin) in all_matches(policy) {
        found.extend(matches.at.iter().map(|place| (place, origin)));
    }
    found
}

/// All matches in a policy, `not` included, with where they stand.
fn all_matches(policy: &Policy) -> Vec<(&Match, &Origin)> {
    let mut tops: Vec<(&Match, Option<&Origin>)> = Vec::new();
    tops.extend(policy.assign.iter().map(|rule| (&rule.matches, Some(&rule.origin))));
    tops.extend(policy.deny.iter().map(|rule| (&rule.matches, Some(&rule.origin))));
    tops.extend(policy.devices.values().map(|def| (&def.matches, Some(&def.origin))));
    tops.extend(policy.vms.values().flat_map(|vm| vm.deny.iter().map(|one| (one, Some(&vm.origin)))));
    tops.extend(policy.protect.keep_on_host.iter().map(|one| (one, None)));
    let mut found = Vec::new();
    for (matches, origin) in tops {
        for one in std::iter::once(matches).chain(&matches.not) {
            found.extend(one.spot.0.as_ref().or(origin).map(|origin| (one, origin)));
        }
    }
    found
}

/// Places that will not last or do not exist.
fn places(policy: &Policy, topology: Option<&Topology>, problems: &mut Vec<Problem>) {
    for (place, origin) in all_places(policy) {
        match place {
            PlaceRef::Kernel(name) | PlaceRef::Eve(name) => {
                let stable = topology.and_then(|topology| topology.port_of(name));
                let message =
                    format!("bus numbers change from boot to boot: {place} may be another port tomorrow");
                let help = match (&stable, topology) {
                    (Some(port), _) => format!("write {port}"),
                    (None, Some(_)) => format!("there is no bus {} on this host now", name.bus),
                    (None, None) => {
                        "check it on the host, or with --devices, to see the stable form".to_owned()
                    }
                };
                problems
                    .push(Problem::new(Severity::Warning, "unstable-port", message).at(origin).help(help));
            }
            PlaceRef::Port(port) => {
                if let Some(message) = topology.and_then(|topology| missing(port, topology)) {
                    problems.push(Problem::new(Severity::Warning, "missing-port", message).at(origin));
                }
            }
            PlaceRef::Named(_) => {}
        }
    }
}

/// Why a port cannot be there. Ports of hubs are not looked at: a hub may be plugged in later.
fn missing(port: &PortAddress, topology: &Topology) -> Option<String> {
    let is_here =
        |half| topology.buses.values().any(|root| root.controller == port.controller && half == root.half);
    if !is_here(port.half) {
        return Some(format!("{port}: this host has no {} bus on {}", port.half, port.controller));
    }
    let mut root = port.clone();
    while let Some(above) = root.parent() {
        root = above;
    }
    (!topology.ports.contains_key(&root))
        .then(|| format!("{port}: {} has no {} port {}", port.controller, port.half, root.chain))
}

/// What is declared and never used.
fn unused(policy: &Policy, problems: &mut Vec<Problem>) {
    let mut connectors = BTreeSet::new();
    let mut devices = BTreeSet::new();
    for (matches, _) in all_matches(policy) {
        devices.extend(matches.device.iter());
        connectors.extend(
            matches
                .at
                .iter()
                .filter_map(|place| if let PlaceRef::Named(name) = place { Some(name) } else { None }),
        );
    }
    let mut note = |message: String, origin: &Origin| {
        problems.push(Problem::new(Severity::Note, "unused", message).at(origin));
    };
    for (name, def) in policy.connectors.iter().filter(|(name, _)| !connectors.contains(name)) {
        note(format!("no rule uses connector {name}"), &def.origin);
    }
    for (name, def) in policy.devices.iter().filter(|(name, _)| !devices.contains(name)) {
        note(format!("no rule uses device {name}"), &def.origin);
    }
    for (name, def) in
        policy.vms.iter().filter(|(name, _)| !policy.assign.iter().any(|rule| rule.vms.contains(name)))
    {
        note(format!("no rule gives VM {name} a device"), &def.origin);
    }
}

#[cfg(test)]
mod tests;
