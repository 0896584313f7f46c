//! What `usbpolicyctl check` finds in a policy that loads: claims that can tie, rules that never win, places that will
//! not last, matches that a lying device can satisfy.

use std::collections::BTreeSet;

use common::ids::VmName;

use super::compile::{Clause, CompiledPolicy, Rule};
use super::condition::{Condition, Specificity};
use super::decide::tie_rule;
use super::overlap::{can_meet, implies};
use super::problem::{Problem, Severity};
use super::schema::{Mode, OnConflict};

/// The most ties that are reported.
const TIES_MAX: usize = 50;

/// How often we try to show that a better claim settles a tie. After that, each possible tie is reported.
const PROOFS_MAX: usize = 1_000_000;

/// A part of a rule in which each device has the same specificity.
pub(super) struct Piece<'p> {
    pub(super) number: usize,
    pub(super) rule: &'p Rule,
    pub(super) clause: Clause,
    pub(super) specificity: Specificity,
}

impl Piece<'_> {
    fn rank(&self) -> (i32, Specificity) {
        (self.rule.priority, self.specificity)
    }
}

/// All pieces of all rules.
pub(super) fn pieces(policy: &CompiledPolicy) -> Vec<Piece<'_>> {
    let mut all = Vec::new();
    for (number, rule) in policy.rules.iter().enumerate() {
        for clause in &rule.matcher.clauses {
            for (clause, specificity) in split(clause) {
                all.push(Piece { number, rule, clause, specificity });
            }
        }
    }
    all
}

/// Splits a clause so that each part has one specificity: exact ids from vendors, ports from subtrees.
fn split(clause: &Clause) -> Vec<(Clause, Specificity)> {
    let base = if clause.nots.is_empty() { Specificity::default() } else { Specificity::PROPERTY };
    let empty =
        Clause { conditions: Vec::new(), nots: clause.nots.clone(), stands_for: clause.stands_for.clone() };
    let mut parts = vec![(empty, base)];
    for condition in &clause.conditions {
        let mut next = Vec::new();
        for (worth, part) in by_specificity(condition) {
            for (clause, specificity) in &parts {
                let mut clause = clause.clone();
                clause.conditions.push(part.clone());
                next.push((clause, specificity.with(worth)));
            }
        }
        parts = next;
    }
    parts
}

fn by_specificity(condition: &Condition) -> Vec<(Specificity, Condition)> {
    let worths: BTreeSet<Specificity> = condition.possible().into_iter().collect();
    let of = |worth: Specificity| match condition {
        Condition::Id(ids) => Condition::Id(
            ids.iter().copied().filter(|id| Condition::Id(vec![*id]).possible().contains(&worth)).collect(),
        ),
        Condition::At(places) => {
            Condition::At(places.iter().filter(|place| place.specificity() == worth).cloned().collect())
        }
        other => other.clone(),
    };
    worths.into_iter().map(|worth| (worth, of(worth))).collect()
}

/// Rules of different VMs that some device can tie.
///
/// Nothing is reported only if no device can: each pair of pieces with equal rank has been proved apart, or to lie where
/// a deny or a better claim decides.
pub(super) fn ties(policy: &CompiledPolicy, pieces: &[Piece<'_>], problems: &mut Vec<Problem>) {
    let mut reported = BTreeSet::new();
    let mut proofs = PROOFS_MAX;
    for (index, left) in pieces.iter().enumerate() {
        for right in pieces.iter().skip(index) {
            let pair = (left.number, right.number);
            if left.rank() != right.rank()
                || reported.contains(&pair)
                || !can_tie(policy, pieces, left, right, &mut proofs)
            {
                continue;
            }
            if reported.len() == TIES_MAX {
                let message =
                    format!("more than {TIES_MAX} pairs of rules can tie; the others are not listed");
                problems.push(Problem::new(Severity::Warning, "tie", message));
                return;
            }
            reported.insert(pair);
            problems.push(tie(left, right));
        }
    }
}

fn can_tie(
    policy: &CompiledPolicy,
    pieces: &[Piece<'_>],
    left: &Piece<'_>,
    right: &Piece<'_>,
    proofs: &mut usize,
) -> bool {
    let is_manual = |piece: &Piece<'_>| piece.rule.options.mode == Mode::Manual;
    if is_manual(left) && is_manual(right) {
        return false;
    }
    let same_single_vm = left.rule.vms.len() == 1 && left.rule.vms == right.rule.vms;
    if same_single_vm || !can_meet(&[&left.clause, &right.clause]) {
        return false;
    }
    let both = [&left.clause, &right.clause];
    let settled = kept_or_denied(policy, &both).is_some()
        || pieces.iter().filter(|other| other.rank() > left.rank()).any(|other| {
            *proofs = proofs.saturating_sub(1);
            *proofs > 0 && claims_all(policy, &both, other)
        });
    let rivals = |a: &VmName, b: &VmName| {
        a != b && !vm_denies_all(policy, a, &both) && !vm_denies_all(policy, b, &both)
    };
    !settled && left.rule.vms.iter().any(|a| right.rule.vms.iter().any(|b| rivals(a, b)))
}

/// Whether each device that fits all clauses fits this piece too, and no VM's own deny can take the claim away.
fn claims_all(policy: &CompiledPolicy, clauses: &[&Clause], piece: &Piece<'_>) -> bool {
    let may_deny = |vm: &VmName| {
        let Some(vm) = policy.vms.get(vm) else { return true };
        vm.deny.clauses.iter().any(|deny| {
            let with: Vec<&Clause> = clauses.iter().copied().chain([deny]).collect();
            can_meet(&with)
        })
    };
    implies(clauses, &piece.clause) && piece.rule.vms.iter().any(|vm| !may_deny(vm))
}

/// What keeps each device that fits all clauses from every VM.
fn kept_or_denied(policy: &CompiledPolicy, clauses: &[&Clause]) -> Option<String> {
    if policy.keep_on_host.clauses.iter().any(|kept| implies(clauses, kept)) {
        return Some("protect.keep_on_host has all its devices".to_owned());
    }
    let denies = policy.denies.iter();
    let mut covering =
        denies.filter(|deny| deny.matcher.clauses.iter().any(|clause| implies(clauses, clause)));
    covering.next().map(|deny| format!("deny rule {} has all its devices", deny.label))
}

fn vm_denies_all(policy: &CompiledPolicy, vm: &VmName, clauses: &[&Clause]) -> bool {
    policy.vms.get(vm).is_some_and(|vm| vm.deny.clauses.iter().any(|deny| implies(clauses, deny)))
}

fn tie(left: &Piece<'_>, right: &Piece<'_>) -> Problem {
    let how = tie_rule([left.rule.on_conflict, right.rule.on_conflict].into_iter());
    let severity = if how == OnConflict::Refuse { Severity::Warning } else { Severity::Note };
    let code = if how == OnConflict::Refuse { "tie" } else { "tie-settled" };
    let (priority, specificity) = left.rank();
    let claim = format!("priority {priority}, specificity {specificity}");
    let then = match how {
        OnConflict::Refuse => "nobody gets such a device".to_owned(),
        how => format!("on_conflict {how} settles it"),
    };
    let message = if left.number == right.number {
        let vms = left.rule.vms.iter().map(VmName::as_str).collect::<Vec<_>>().join(", ");
        format!("rule {} gives VMs {vms} equal claims ({claim}): {then}", left.rule.label)
    } else {
        let device = describe(&[&left.clause, &right.clause]);
        format!(
            "rules {} and {} can tie ({claim}) over a device with {device}: {then}",
            left.rule.label, right.rule.label
        )
    };
    let problem = Problem::new(severity, code, message).at(&left.rule.origin);
    match how {
        OnConflict::Refuse => {
            problem.help("make one more specific, set priority or on_conflict, or mode = \"manual\"")
        }
        _ => problem,
    }
}

/// What a device that fits all clauses has, for people.
fn describe(clauses: &[&Clause]) -> String {
    let mut parts: Vec<String> = Vec::new();
    for condition in clauses.iter().flat_map(|clause| &clause.conditions) {
        let part = format!("{} {}", condition.key(), condition.wanted());
        if !parts.contains(&part) {
            parts.push(part);
        }
    }
    if parts.is_empty() { "anything".to_owned() } else { parts.join(", ") }
}

/// Rules that no device can win by.
pub(super) fn unreachable(policy: &CompiledPolicy, pieces: &[Piece<'_>], problems: &mut Vec<Problem>) {
    for (number, rule) in policy.rules.iter().enumerate() {
        let own: Vec<&Piece<'_>> = pieces.iter().filter(|piece| piece.number == number).collect();
        let reasons: Option<Vec<String>> = own.iter().map(|piece| why_never(policy, pieces, piece)).collect();
        if let Some(reason) = reasons.and_then(|reasons| reasons.into_iter().next()) {
            let message = format!("rule {} never applies: {reason}", rule.label);
            problems.push(Problem::new(Severity::Warning, "unreachable", message).at(&rule.origin));
        }
    }
}

fn why_never(policy: &CompiledPolicy, pieces: &[Piece<'_>], piece: &Piece<'_>) -> Option<String> {
    let alone = [&piece.clause];
    if !can_meet(&alone) {
        return Some("no device that may leave the host fits its match".to_owned());
    }
    if let Some(why) = kept_or_denied(policy, &alone) {
        return Some(why);
    }
    if piece.rule.vms.iter().all(|vm| vm_denies_all(policy, vm, &alone)) {
        return Some("its VMs deny all its devices".to_owned());
    }
    let better = |other: &&Piece<'_>| {
        other.number != piece.number && other.rank() > piece.rank() && claims_all(policy, &alone, other)
    };
    pieces.iter().find(better).map(|other| format!("rule {} always wins", other.rule.label))
}

/// Rules of one VM that can tie with different options: names decide then.
pub(super) fn equal_rules(pieces: &[Piece<'_>], problems: &mut Vec<Problem>) {
    let mut reported = BTreeSet::new();
    for (index, left) in pieces.iter().enumerate() {
        for right in pieces.iter().skip(index + 1) {
            let pair = (left.number, right.number);
            let differ = left.number != right.number
                && left.rank() == right.rank()
                && left.rule.vms == right.rule.vms
                && left.rule.options != right.rule.options;
            if reported.len() >= TIES_MAX {
                return;
            }
            if !differ || reported.contains(&pair) {
                continue;
            }
            if can_meet(&[&left.clause, &right.clause]) {
                reported.insert(pair);
                let (first, second) = (&left.rule.label, &right.rule.label);
                let message = format!(
                    "rules {first} and {second} of one VM can match one device alike, with different options; \
                     those of {first} apply"
                );
                problems.push(Problem::new(Severity::Note, "equal-rules", message).at(&right.rule.origin));
            }
        }
    }
}
