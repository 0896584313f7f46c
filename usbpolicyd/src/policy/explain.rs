//! The whole way to a decision: each guard, each rule, each key. Made with the same tests as the decision itself.

use common::ids::VmName;
use serde::Serialize;

use super::compile::{Clause, CompiledPolicy, Matcher};
use super::condition::{Condition, Specificity};
use super::decide::{Claim, Context, Order, Verdict, always_kept, claims, decide, tie_rule};
use super::schema::{Mode, OnConflict};
use crate::facts::{DeviceFacts, HostUse};

/// Name and version of the form of an explanation in JSON. The number grows when something is taken away or changes
/// its meaning, not when something is added.
pub const EXPLAIN_SCHEMA: &str = "usbpolicyctl-explain/1";

/// One key of a match.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeyTrace {
    /// The key, `interfaces.any`.
    pub key: &'static str,
    /// What the rule asks for.
    pub wanted: String,
    /// What the device has; not escaped.
    pub found: String,
    /// Whether it fits.
    pub fits: bool,
    /// Why it does not; not escaped. Empty when it fits.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub misfit: String,
}

/// One way to match.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ClauseTrace {
    /// The named device it stands for; empty for the match itself.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stands_for: String,
    /// Whether it fits.
    pub fits: bool,
    /// Its keys.
    pub keys: Vec<KeyTrace>,
    /// The keys of each `not`, which must not all fit.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not: Vec<ClauseTrace>,
}

impl ClauseTrace {
    fn of(clause: &Clause, device: &DeviceFacts) -> Self {
        let key = |condition: &Condition| {
            let fits = condition.test(device).is_some();
            KeyTrace {
                key: condition.key(),
                wanted: condition.wanted(),
                found: condition.found(device),
                fits,
                misfit: if fits { String::new() } else { condition.misfit(device) },
            }
        };
        Self {
            stands_for: clause.stands_for.clone(),
            fits: clause.test(device).is_some(),
            keys: clause.conditions.iter().map(key).collect(),
            not: clause.nots.iter().map(|not| Self::of(not, device)).collect(),
        }
    }

    /// How many keys fit, and how many there are.
    fn fitting(&self) -> (usize, usize) {
        (self.keys.iter().filter(|key| key.fits).count(), self.keys.len())
    }
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RuleTrace {
    /// Its name, or file and line.
    pub rule: String,
    /// File, line and column.
    pub origin: String,
    /// The VMs it is for; none for a deny rule.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vms: Vec<VmName>,
    /// Whether it matches.
    pub matches: bool,
    /// Priority of an assign rule that matches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    /// Specificity of an assign rule that matches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub specificity: Option<Specificity>,
    /// Mode of an assign rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Reason of a deny rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The ways to match it.
    pub clauses: Vec<ClauseTrace>,
}

impl RuleTrace {
    /// The way to match that came closest: one that fits, else the first whose id fits, else the first.
    pub fn closest(&self) -> Option<&ClauseTrace> {
        let other_id = |clause: &&ClauseTrace| clause.keys.iter().any(|key| key.key == "id" && !key.fits);
        self.clauses.iter().min_by_key(|clause| (!clause.fits, other_id(clause)))
    }

    /// Why it does not match: the first key that does not fit in the way that came closest.
    pub fn why_not(&self) -> Option<String> {
        let closest = self.closest().filter(|clause| !clause.fits)?;
        Some(match closest.keys.iter().find(|key| !key.fits) {
            Some(key) => format!("{}: {}", key.key, key.misfit),
            None => "not: it is what the rule excludes".to_owned(),
        })
    }
}

/// A guard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GuardTrace {
    /// `hub`, `kept on host` or `in use`.
    pub guard: &'static str,
    /// Whether it holds the device.
    pub holds: bool,
}

/// Everything about one decision.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// [`EXPLAIN_SCHEMA`].
    pub schema: &'static str,
    /// The device.
    pub device: DeviceFacts,
    /// Its fingerprint.
    pub fingerprint: String,
    /// The operator's name for its connector.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connector_name: Option<String>,
    /// The guards.
    pub guards: Vec<GuardTrace>,
    /// What the host does with it.
    pub host_use: Vec<HostUse>,
    /// The deny rules.
    pub deny: Vec<RuleTrace>,
    /// The VMs that deny it themselves though a rule gives it to them.
    pub vm_deny: Vec<VmName>,
    /// An operator's order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// The assign rules, those that match and rank highest first.
    pub assign: Vec<RuleTrace>,
    /// How it was settled when there was more to it than one best rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settled: Option<String>,
    /// The decision.
    pub decision: Verdict,
}

/// Explains what [`decide`] says.
pub fn explain(policy: &CompiledPolicy, device: &DeviceFacts, context: &Context) -> Explanation {
    let mut deny: Vec<RuleTrace> = policy
        .denies
        .iter()
        .map(|rule| RuleTrace {
            rule: rule.label.clone(),
            origin: rule.origin.to_string(),
            vms: Vec::new(),
            matches: rule.matcher.test(device).is_some(),
            priority: None,
            specificity: None,
            mode: None,
            reason: rule.reason.clone(),
            clauses: trace(&rule.matcher, device),
        })
        .collect();
    let mut assign: Vec<RuleTrace> = policy
        .rules
        .iter()
        .map(|rule| {
            let specificity = rule.matcher.test(device);
            RuleTrace {
                rule: rule.label.clone(),
                origin: rule.origin.to_string(),
                vms: rule.vms.clone(),
                matches: specificity.is_some(),
                priority: specificity.map(|_| rule.priority),
                specificity,
                mode: Some(rule.options.mode),
                reason: None,
                clauses: trace(&rule.matcher, device),
            }
        })
        .collect();
    deny.sort_by_key(by_interest);
    assign.sort_by_key(by_interest);
    let decision = decide(policy, device, context);
    Explanation {
        schema: EXPLAIN_SCHEMA,
        fingerprint: device.fingerprint().to_string(),
        connector_name: policy.connector_name(&device.connector).map(str::to_owned),
        guards: guards(policy, device),
        host_use: device.host_use.clone(),
        deny,
        vm_deny: denying_vms(policy, device),
        order: context.order.clone(),
        assign,
        settled: settled(policy, device, context, &decision),
        decision,
        device: device.clone(),
    }
}

fn trace(matcher: &Matcher, device: &DeviceFacts) -> Vec<ClauseTrace> {
    matcher.clauses.iter().map(|clause| ClauseTrace::of(clause, device)).collect()
}

/// Matching rules by rank, then the others by how much of them fits.
fn by_interest(rule: &RuleTrace) -> impl Ord + use<> {
    let (fitting, all) = rule.closest().map(ClauseTrace::fitting).unwrap_or_default();
    let rank = std::cmp::Reverse((rule.matches, rule.priority, rule.specificity, fitting));
    (rank, all, rule.rule.clone())
}

fn guards(policy: &CompiledPolicy, device: &DeviceFacts) -> Vec<GuardTrace> {
    let kept = !device.is_hub() && always_kept(policy, device).is_some();
    vec![
        GuardTrace { guard: "hub", holds: device.is_hub() },
        GuardTrace { guard: "kept on host", holds: kept },
        GuardTrace { guard: "in use", holds: !device.host_use.is_empty() },
    ]
}

fn denying_vms(policy: &CompiledPolicy, device: &DeviceFacts) -> Vec<VmName> {
    let denies = |vm: &&VmName| policy.vms.get(*vm).is_some_and(|vm| vm.deny.test(device).is_some());
    let mut vms: Vec<VmName> = policy
        .rules
        .iter()
        .filter(|rule| rule.matcher.test(device).is_some())
        .flat_map(|rule| &rule.vms)
        .filter(denies)
        .cloned()
        .collect();
    vms.sort();
    vms.dedup();
    vms
}

/// What settled the decision beyond "the best rule".
fn settled(
    policy: &CompiledPolicy,
    device: &DeviceFacts,
    context: &Context,
    decision: &Verdict,
) -> Option<String> {
    let claims = claims(policy, device);
    let best = claims.iter().map(Claim::rank).max()?;
    let top: Vec<&Claim<'_>> = claims.iter().filter(|claim| claim.rank() == best).collect();
    if context.order.is_some() {
        return Some("an operator's order goes before all assign rules".to_owned());
    }
    if let (Verdict::Assign { vm, .. }, Some(holder)) = (decision, &context.holder)
        && vm == holder
        && top.iter().any(|claim| claim.vm != vm)
    {
        return Some(format!("{vm} has it and may keep it; no better rule says preempt"));
    }
    if top.len() < 2 || top.iter().all(|claim| claim.rule.options.mode == Mode::Manual) {
        return None;
    }
    let vms = top.iter().map(|claim| claim.vm.as_str()).collect::<Vec<_>>().join(", ");
    let how = tie_rule(top.iter().map(|claim| claim.rule.on_conflict));
    let result = match (how, decision) {
        (_, Verdict::Assign { vm, .. }) => format!("{how} gives it to {vm}"),
        (OnConflict::Refuse, _) => "refuse: nobody gets it".to_owned(),
        (OnConflict::FirstCome, _) => "first-come: none of them is up yet".to_owned(),
        (OnConflict::LastUsed, _) => "last-used: none of them has had it".to_owned(),
    };
    Some(format!("equal claims of {vms}; {result}"))
}

/// The decision in one line, for people.
pub fn sentence(verdict: &Verdict) -> String {
    let names = |vms: &[VmName]| vms.iter().map(VmName::as_str).collect::<Vec<_>>().join(", ");
    match verdict {
        Verdict::Protected { why } => format!("stays with the host: {why}"),
        Verdict::Busy { why } => format!("stays with the host for now: {why}"),
        Verdict::Denied { rule, reason: Some(reason) } => format!("denied by {rule}: {reason}"),
        Verdict::Denied { rule, reason: None } => format!("denied by {rule}"),
        Verdict::Assign { vm, rule, .. } if rule == "order" => {
            format!("goes to {vm}, by an operator's order")
        }
        Verdict::Assign { vm, rule, .. } => format!("goes to {vm}, by rule {rule}"),
        Verdict::Unexpected { vm, rule, why } => {
            format!("not attached: rule {rule} would give it to {vm}, but expects another device: {why}")
        }
        Verdict::Conflict { vms, rules } => {
            format!("nobody gets it: {} have equal claims (rules {})", names(vms), rules.join(", "))
        }
        Verdict::Manual { vms, rules } => {
            format!("waits for an operator: {} may have it (rules {})", names(vms), rules.join(", "))
        }
        Verdict::Kept { actor } => format!("stays with the host, as {actor} ordered"),
        Verdict::Host => "stays with the host: no rule names it".to_owned(),
    }
}
