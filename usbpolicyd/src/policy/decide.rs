//! The decision for one device: who gets it, or why nobody does.
//!
//! The order is total and has nothing to do with the order of rules: guards, denies, an operator's order, then among the
//! assign rules priority and specificity. A decision alone never takes a device from a VM that may have it, unless the
//! winning rule says `preempt`.

use common::ids::VmName;
use serde::{Deserialize, Serialize};

use super::compile::{CompiledPolicy, Options, Rule};
use super::condition::Specificity;
use super::schema::{InUse, Mode, OnConflict};
use crate::facts::{DeviceFacts, HostUseLevel};

/// What an operator ordered for a device. Guards and denies stand above it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// This VM gets it.
    Attach {
        /// Which VM.
        vm: VmName,
        /// Who ordered it.
        actor: String,
    },
    /// No VM gets it.
    Keep {
        /// Who ordered it.
        actor: String,
    },
}

/// What else a decision depends on, besides policy and device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Context {
    /// The VM that has the device now.
    pub holder: Option<VmName>,
    /// The VM that had it last.
    pub last_holder: Option<VmName>,
    /// VMs whose instance is connected, the longest connected first.
    pub up: Vec<VmName>,
    /// An operator's order for the device.
    pub order: Option<Order>,
    /// The device re-enumerates on a connector that a VM follows: that VM, and the label of the rule it had it by.
    pub follow: Option<(VmName, String)>,
    /// Whether the host used the device at an earlier look during this plug-in.
    pub was_busy: bool,
}

/// What is to happen with a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// It never leaves the host.
    Protected {
        /// For people.
        why: String,
    },
    /// The host uses it now.
    Busy {
        /// For people.
        why: String,
    },
    /// A rule forbids it.
    Denied {
        /// Which rule.
        rule: String,
        /// For people.
        reason: Option<String>,
    },
    /// A VM gets it.
    Assign {
        /// Which VM.
        vm: VmName,
        /// By which rule; `order` for an operator's.
        rule: String,
        /// What comes with it.
        options: Box<Options>,
    },
    /// It is not what the winning rule expects there.
    Unexpected {
        /// Which VM would have got it.
        vm: VmName,
        /// Which rule.
        rule: String,
        /// For people.
        why: String,
    },
    /// VMs have equal claims, and nothing says who wins.
    Conflict {
        /// The VMs.
        vms: Vec<VmName>,
        /// Their rules.
        rules: Vec<String>,
    },
    /// A VM may have it when an operator says so.
    Manual {
        /// The VMs.
        vms: Vec<VmName>,
        /// Their rules.
        rules: Vec<String>,
    },
    /// An operator keeps it from all VMs.
    Kept {
        /// Who.
        actor: String,
    },
    /// No rule names it.
    Host,
}

/// One VM's best claim to a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim<'p> {
    pub(super) vm: &'p VmName,
    pub(super) rule: &'p Rule,
    pub(super) specificity: Specificity,
}

impl Claim<'_> {
    pub(super) fn rank(&self) -> (i32, Specificity) {
        (self.rule.priority, self.specificity)
    }
}

/// Decides.
pub fn decide(policy: &CompiledPolicy, device: &DeviceFacts, context: &Context) -> Verdict {
    if let Some(why) = always_kept(policy, device) {
        return Verdict::Protected { why };
    }
    let denied = policy.denies.iter().find(|deny| deny.matcher.test(device).is_some());
    let (verdict, rule) = match denied {
        Some(deny) => (Verdict::Denied { rule: deny.label.clone(), reason: deny.reason.clone() }, None),
        None => rules_say(policy, device, context),
    };
    let wants_it =
        matches!(verdict, Verdict::Assign { .. } | Verdict::Manual { .. } | Verdict::Conflict { .. });
    match in_use(policy, device, context, rule) {
        Some(protected @ Verdict::Protected { .. }) => protected,
        Some(busy) if wants_it => busy,
        _ => verdict,
    }
}

/// A verdict and the rule it comes from, if it is one.
type Said<'p> = (Verdict, Option<&'p Rule>);

/// What order and assign rules say, before the host's own use of the device counts.
fn rules_say<'p>(policy: &'p CompiledPolicy, device: &DeviceFacts, context: &Context) -> Said<'p> {
    let claims = claims(policy, device);
    match &context.order {
        Some(Order::Keep { actor }) => (Verdict::Kept { actor: actor.clone() }, None),
        Some(Order::Attach { vm, .. }) => ordered(policy, device, &claims, vm),
        None => choose(policy, device, context, &claims),
    }
}

/// Why a device never leaves the host, whatever the rules say.
pub(super) fn always_kept(policy: &CompiledPolicy, device: &DeviceFacts) -> Option<String> {
    if device.is_hub() {
        return Some("it is a hub (a connector with subtree gives away what is below it)".into());
    }
    policy.keep_on_host.test(device).map(|_| "protect.keep_on_host names it".into())
}

/// The host's uses that a rule does not allow to be ended.
pub(super) fn in_use(
    policy: &CompiledPolicy,
    device: &DeviceFacts,
    context: &Context,
    rule: Option<&Rule>,
) -> Option<Verdict> {
    let allowed = |used: &&crate::facts::HostUse| {
        rule.is_some_and(|rule| {
            rule.allow_in_use.contains(&used.kind) && (used.level == HostUseLevel::Busy || rule.names_device)
        })
    };
    let mut holding: Vec<_> = device.host_use.iter().filter(|used| !allowed(used)).collect();
    holding.sort_by_key(|used| std::cmp::Reverse(used.level));
    let why = holding.iter().map(|used| used.why.as_str()).collect::<Vec<_>>().join("; ");
    match holding.first().map(|used| used.level) {
        Some(HostUseLevel::Protected) => Some(Verdict::Protected { why }),
        Some(HostUseLevel::Busy) => Some(Verdict::Busy { why }),
        None if context.was_busy && context.holder.is_none() && policy.in_use.0 == InUse::Refuse => {
            Some(Verdict::Busy { why: "the host used it; plug it in again".into() })
        }
        None => None,
    }
}

/// The best claim of each VM that may have the device, by VM.
pub(super) fn claims<'p>(policy: &'p CompiledPolicy, device: &DeviceFacts) -> Vec<Claim<'p>> {
    let mut best: Vec<Claim<'p>> = Vec::new();
    for rule in policy.candidates(device).into_iter().filter_map(|index| policy.rules.get(index)) {
        let Some(specificity) = rule.matcher.test(device) else { continue };
        for vm in &rule.vms {
            let claim = Claim { vm, rule, specificity };
            match best.iter_mut().find(|other| other.vm == vm) {
                Some(other) if other.rank() < claim.rank() => *other = claim,
                Some(_) => {}
                None => best.push(claim),
            }
        }
    }
    best.retain(|claim| !vm_denies(policy, claim.vm, device));
    best.sort_by_key(|claim| claim.vm);
    best
}

pub(super) fn vm_denies(policy: &CompiledPolicy, vm: &VmName, device: &DeviceFacts) -> bool {
    policy.vms.get(vm).is_none_or(|vm| vm.deny.test(device).is_some())
}

/// An operator's order. The VM needs no rule for the device, but must not deny it.
fn ordered<'p>(
    policy: &'p CompiledPolicy,
    device: &DeviceFacts,
    claims: &[Claim<'p>],
    vm: &VmName,
) -> Said<'p> {
    if let Some(claim) = claims.iter().find(|claim| claim.vm == vm) {
        return assign(claim, device);
    }
    if vm_denies(policy, vm, device) {
        let reason = Some(format!("vms.{vm}.deny names it, or there is no such VM"));
        return (Verdict::Denied { rule: format!("vms.{vm}.deny"), reason }, None);
    }
    let defaults = &policy.defaults;
    let options = Options {
        mode: Mode::Manual,
        on_release: defaults.on_release,
        reset: defaults.reset,
        configuration: None,
        follow: defaults.follow,
        flap: None,
        max_devices: None,
    };
    (Verdict::Assign { vm: vm.clone(), rule: "order".to_owned(), options: Box::new(options) }, None)
}

fn choose<'p>(
    policy: &'p CompiledPolicy,
    device: &DeviceFacts,
    context: &Context,
    claims: &[Claim<'p>],
) -> Said<'p> {
    let Some(rank) = claims.iter().map(Claim::rank).max() else {
        return followed(policy, device, context);
    };
    let top: Vec<&Claim<'_>> = claims.iter().filter(|claim| claim.rank() == rank).collect();
    let held = context.holder.as_ref().and_then(|holder| claims.iter().find(|claim| claim.vm == holder));
    if let Some(held) = held {
        let outranked = top.iter().any(|claim| claim.rule.preempt) && held.rank() < rank;
        if !outranked {
            return assign(held, device);
        }
    }
    let all_manual = top.iter().all(|claim| claim.rule.options.mode == Mode::Manual);
    let winner = match top.as_slice() {
        [only] => Some(*only),
        _ if all_manual => None,
        _ => tie_break(&top, context),
    };
    let vms = || top.iter().map(|claim| claim.vm.clone()).collect();
    match winner {
        Some(winner) if winner.rule.options.mode == Mode::Manual => {
            let (vms, rules) = (vec![winner.vm.clone()], vec![winner.rule.label.clone()]);
            (Verdict::Manual { vms, rules }, Some(winner.rule))
        }
        Some(winner) => assign(winner, device),
        None if all_manual => (Verdict::Manual { vms: vms(), rules: labels(&top) }, None),
        None => (Verdict::Conflict { vms: vms(), rules: labels(&top) }, None),
    }
}

/// The winner among equal claims. All rules must agree on how it is found.
fn tie_break<'c, 'p>(top: &[&'c Claim<'p>], context: &Context) -> Option<&'c Claim<'p>> {
    let of_vm = |vm: &VmName| top.iter().copied().find(|claim| claim.vm == vm);
    if let Some(claim) = context.follow.as_ref().and_then(|(vm, _)| of_vm(vm)) {
        return Some(claim);
    }
    match tie_rule(top.iter().map(|claim| claim.rule.on_conflict)) {
        OnConflict::Refuse => None,
        OnConflict::FirstCome => context.up.iter().find_map(of_vm),
        OnConflict::LastUsed => context.last_holder.as_ref().and_then(of_vm),
    }
}

/// Rules that disagree on how a tie is broken refuse it.
pub(super) fn tie_rule(mut all: impl Iterator<Item = OnConflict>) -> OnConflict {
    let first = all.next().unwrap_or(OnConflict::Refuse);
    if all.all(|other| other == first) { first } else { OnConflict::Refuse }
}

/// A device that no rule names, on a connector that a VM follows: it goes where its former self was.
fn followed<'p>(policy: &'p CompiledPolicy, device: &DeviceFacts, context: &Context) -> Said<'p> {
    let Some((vm, label)) = &context.follow else { return (Verdict::Host, None) };
    let rule = policy.rules.iter().find(|rule| rule.label == *label && rule.vms.contains(vm));
    match rule {
        Some(rule) if rule.options.follow.is_some() && !vm_denies(policy, vm, device) => {
            let options = Box::new(rule.options.clone());
            (Verdict::Assign { vm: vm.clone(), rule: rule.label.clone(), options }, Some(rule))
        }
        _ => (Verdict::Host, None),
    }
}

fn assign<'p>(claim: &Claim<'p>, device: &DeviceFacts) -> Said<'p> {
    let (vm, rule) = (claim.vm.clone(), claim.rule.label.clone());
    let verdict = match unexpected(claim.rule, device) {
        Some(why) => Verdict::Unexpected { vm, rule, why },
        None => Verdict::Assign { vm, rule, options: Box::new(claim.rule.options.clone()) },
    };
    (verdict, Some(claim.rule))
}

/// What of `expect` does not hold.
pub(super) fn unexpected(rule: &Rule, device: &DeviceFacts) -> Option<String> {
    let expect = &rule.expect;
    if !expect.id.is_empty() && !expect.id.iter().any(|id| id.matches(device.id)) {
        return Some(format!("its id is {}", device.id));
    }
    let serial = device.serial.as_deref();
    if !expect.serial.is_empty()
        && !expect.serial.iter().any(|glob| serial.is_some_and(|text| glob.matches(text)))
    {
        return Some("its serial number is another".to_owned());
    }
    let fingerprint = device.fingerprint();
    if !expect.fingerprint.is_empty() && !expect.fingerprint.contains(&fingerprint) {
        return Some(format!("its fingerprint is {fingerprint}"));
    }
    None
}

fn labels(claims: &[&Claim<'_>]) -> Vec<String> {
    let mut labels: Vec<String> = claims.iter().map(|claim| claim.rule.label.clone()).collect();
    labels.sort();
    labels.dedup();
    labels
}

#[cfg(test)]
mod tests;
