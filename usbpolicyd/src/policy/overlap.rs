//! Proofs about clauses: that no device fits two of them, or that each device that fits one fits another.
//!
//! Both answers are safe to build on: [`can_meet`] says no, and [`implies`] says yes, only when it is certain. In doubt
//! `can_meet` says yes and `implies` says no, and `check` reports a tie that may not be one.

use super::compile::Clause;
use super::condition::{Condition, Place, Where};
use super::pattern::{ClassPattern, ClassSet, Glob};
use crate::facts::CLASS_HUB;
use crate::topology::{Connector, Controller, PortAddress};

/// Where the search over interface classes gives up and says "perhaps".
const CANDIDATES_MAX: usize = 4096;

/// Whether a device that is no hub can fit all clauses at once.
pub(super) fn can_meet(clauses: &[&Clause]) -> bool {
    let conditions: Vec<&Condition> = clauses.iter().flat_map(|clause| &clause.conditions).collect();
    for (index, left) in conditions.iter().enumerate() {
        if conditions.iter().skip(index + 1).any(|right| !compatible(left, right)) {
            return false;
        }
    }
    if !interfaces_exist(&conditions) {
        return false;
    }
    let excluded = |not: &Clause| implies(clauses, not);
    !clauses.iter().flat_map(|clause| &clause.nots).any(excluded)
}

/// Whether each device that fits all `clauses` fits `wanted`.
pub(super) fn implies(clauses: &[&Clause], wanted: &Clause) -> bool {
    let conditions: Vec<&Condition> = clauses.iter().flat_map(|clause| &clause.conditions).collect();
    wanted.conditions.iter().all(|wanted| condition_implied(&conditions, wanted))
        && wanted.nots.iter().all(|not| {
            let with: Vec<&Clause> = clauses.iter().copied().chain([not]).collect();
            !can_meet(&with)
        })
}

/// Whether one device can fit both conditions, as far as these two alone tell.
fn compatible(left: &Condition, right: &Condition) -> bool {
    use Condition as C;
    match (left, right) {
        (C::Id(a), C::Id(b)) => pairs(a, b, |a, b| a.overlaps(*b)),
        (C::At(a), C::At(b)) => pairs(a, b, places_meet),
        (C::At(places), C::Controller(all)) | (C::Controller(all), C::At(places)) => {
            places.iter().any(|place| may_be_on(place, all))
        }
        (C::Controller(a), C::Controller(b)) => pairs(a, b, |a, b| a == b),
        (C::Depth(a), C::Depth(b)) => pairs(a, b, |a, b| a == b),
        (C::Speed(a), C::Speed(b)) => pairs(a, b, |a, b| a == b),
        (C::Removable(a), C::Removable(b)) => pairs(a, b, |a, b| a == b),
        (C::ConnectType(a), C::ConnectType(b)) => pairs(a, b, |a, b| a == b),
        (C::Fingerprint(a), C::Fingerprint(b)) => pairs(a, b, |a, b| a == b),
        (C::Class(a), C::Class(b)) => pairs(&flat(a), &flat(b), |a, b| a.meet(*b).is_some()),
        (C::Serial(a), C::Serial(b))
        | (C::Product(a), C::Product(b))
        | (C::Manufacturer(a), C::Manufacturer(b)) => pairs(a, b, Glob::overlaps),
        _ => true,
    }
}

fn pairs<T>(left: &[T], right: &[T], mut fits: impl FnMut(&T, &T) -> bool) -> bool {
    left.iter().any(|a| right.iter().any(|b| fits(a, b)))
}

fn flat(sets: &[ClassSet]) -> Vec<ClassPattern> {
    sets.iter().flat_map(|set| set.patterns().iter().copied()).collect()
}

/// Whether a device can be in both places.
fn places_meet(left: &Place, right: &Place) -> bool {
    match (&left.at, &right.at) {
        (
            Where::Connector { connector: a, complete: a_known },
            Where::Connector { connector: b, complete: b_known },
        ) => {
            connectors_meet(a, left.subtree, b, right.subtree)
                || (!a_known && !b_known && may_be_two_halves(a, b))
                || (left.subtree || right.subtree) && !(*a_known && *b_known) && may_be_two_halves(a, b)
        }
        (Where::Kernel(a), Where::Kernel(b)) if a.bus == b.bus => {
            let (a_ports, b_ports) = (a.chain.ports(), b.chain.ports());
            a_ports == b_ports
                || left.subtree && b_ports.starts_with(a_ports)
                || right.subtree && a_ports.starts_with(b_ports)
        }
        // A bus that does not exist now may turn out to be any controller.
        _ => true,
    }
}

fn connectors_meet(a: &Connector, a_subtree: bool, b: &Connector, b_subtree: bool) -> bool {
    a.meets(b) || (a_subtree && a.is_at_or_above(b)) || (b_subtree && b.is_at_or_above(a))
}

/// Whether ports of two connectors can be the two halves of one socket that we have not been told of.
fn may_be_two_halves(a: &Connector, b: &Connector) -> bool {
    let other_half = |a: &PortAddress, b: &PortAddress| a.controller == b.controller && a.half != b.half;
    a.halves.iter().any(|a| b.halves.iter().any(|b| other_half(a, b)))
}

fn may_be_on(place: &Place, controllers: &[Controller]) -> bool {
    match &place.at {
        Where::Connector { connector, .. } => {
            connector.halves.iter().any(|half| controllers.contains(&half.controller))
        }
        Where::Kernel(_) => true,
    }
}

/// Whether a set of interfaces can satisfy all interface conditions together.
fn interfaces_exist(conditions: &[&Condition]) -> bool {
    let hub = ClassPattern { class: Some(CLASS_HUB), subclass: None, protocol: None };
    let mut allowed: Vec<Vec<ClassPattern>> = Vec::new();
    let mut forbidden = vec![hub];
    let mut required: Vec<Vec<ClassPattern>> = Vec::new();
    for condition in conditions {
        match condition {
            Condition::AnyInterface(sets) => required.push(flat(sets)),
            Condition::AllInterfaces(sets) => required.extend(sets.iter().map(|set| set.patterns().to_vec())),
            Condition::NoInterface(sets) => forbidden.extend(flat(sets)),
            Condition::OnlyInterfaces(sets) => {
                allowed.push(flat(sets));
                required.push(vec![ClassPattern::ANY]);
            }
            Condition::ExactlyInterfaces(sets) => {
                allowed.push(flat(sets));
                required.extend(sets.iter().map(|set| set.patterns().to_vec()));
            }
            Condition::Class(sets) if flat(sets).iter().all(|pattern| hub.covers(*pattern)) => return false,
            _ => {}
        }
    }
    required.into_iter().all(|group| interface_exists(group, &allowed, &forbidden))
}

/// Whether an interface can be of one of `group`, of one of each `allowed` list, and of none `forbidden`.
fn interface_exists(
    group: Vec<ClassPattern>,
    allowed: &[Vec<ClassPattern>],
    forbidden: &[ClassPattern],
) -> bool {
    let mut candidates = group;
    for list in allowed {
        let mut narrowed: Vec<ClassPattern> = Vec::new();
        for candidate in &candidates {
            narrowed.extend(list.iter().filter_map(|one| candidate.meet(*one)));
        }
        narrowed.sort_unstable();
        narrowed.dedup();
        if narrowed.len() > CANDIDATES_MAX {
            return true;
        }
        candidates = narrowed;
    }
    candidates.iter().any(|candidate| !forbidden.iter().any(|one| one.covers(*candidate)))
}

/// Whether the conditions, which all hold, make `wanted` hold.
fn condition_implied(known: &[&Condition], wanted: &Condition) -> bool {
    match wanted {
        Condition::AllInterfaces(sets) => sets.iter().all(|set| some_interface(known, set.patterns())),
        Condition::AnyInterface(sets) => some_interface(known, &flat(sets)),
        Condition::ExactlyInterfaces(sets) => {
            known.iter().any(|one| only_these(one, &flat(sets)))
                && sets.iter().all(|set| some_interface(known, set.patterns()))
        }
        Condition::OnlyInterfaces(sets) => known.iter().any(|one| only_these(one, &flat(sets))),
        Condition::NoInterface(sets) => {
            let sets = flat(sets);
            known.iter().any(|one| none_of_these(one, &sets))
        }
        Condition::Id(ids) if ids.iter().any(|id| id.vendor.is_none()) => true,
        _ => known.iter().any(|one| one_implies(one, wanted)),
    }
}

fn one_implies(known: &Condition, wanted: &Condition) -> bool {
    use Condition as C;
    match (known, wanted) {
        (C::Id(a), C::Id(b)) => within(a, b, |a, b| b.covers(*a)),
        (C::At(a), C::At(b)) => within(a, b, place_within),
        (C::At(places), C::Controller(all)) => places.iter().all(|place| must_be_on(place, all)),
        (C::Controller(a), C::Controller(b)) => within(a, b, |a, b| a == b),
        (C::Depth(a), C::Depth(b)) => within(a, b, |a, b| a == b),
        (C::Speed(a), C::Speed(b)) => within(a, b, |a, b| a == b),
        (C::Removable(a), C::Removable(b)) => within(a, b, |a, b| a == b),
        (C::ConnectType(a), C::ConnectType(b)) => within(a, b, |a, b| a == b),
        (C::Fingerprint(a), C::Fingerprint(b)) => within(a, b, |a, b| a == b),
        (C::Class(a), C::Class(b)) => within(&flat(a), &flat(b), |a, b| b.covers(*a)),
        (C::Serial(a), C::Serial(b))
        | (C::Product(a), C::Product(b))
        | (C::Manufacturer(a), C::Manufacturer(b)) => within(a, b, |a, b| b.covers(a)),
        _ => false,
    }
}

/// Whether each of `narrow` lies in one of `wide`.
fn within<T>(narrow: &[T], wide: &[T], mut fits: impl FnMut(&T, &T) -> bool) -> bool {
    narrow.iter().all(|a| wide.iter().any(|b| fits(a, b)))
}

/// Whether each device in `narrow` is in `wide`.
fn place_within(narrow: &Place, wide: &Place) -> bool {
    if narrow.subtree && !wide.subtree {
        return false;
    }
    match (&narrow.at, &wide.at) {
        (Where::Connector { connector: a, .. }, Where::Connector { connector: b, .. }) if wide.subtree => {
            a.halves.iter().all(|half| b.halves.iter().any(|above| above.is_at_or_above(half)))
        }
        (Where::Connector { connector: a, .. }, Where::Connector { connector: b, .. }) => {
            a.halves.is_subset(&b.halves)
        }
        (Where::Kernel(a), Where::Kernel(b)) => {
            a.bus == b.bus
                && if wide.subtree {
                    a.chain.ports().starts_with(b.chain.ports())
                } else {
                    a.chain == b.chain
                }
        }
        _ => false,
    }
}

fn must_be_on(place: &Place, controllers: &[Controller]) -> bool {
    match &place.at {
        Where::Connector { connector, .. } => {
            connector.halves.iter().all(|half| controllers.contains(&half.controller))
        }
        Where::Kernel(_) => false,
    }
}

/// Whether some condition promises an interface that fits one of `patterns`.
fn some_interface(known: &[&Condition], patterns: &[ClassPattern]) -> bool {
    let all_covered = |group: &[ClassPattern]| within(group, patterns, |a, b| b.covers(*a));
    known.iter().any(|one| match one {
        Condition::AnyInterface(sets) | Condition::OnlyInterfaces(sets) => all_covered(&flat(sets)),
        Condition::AllInterfaces(sets) | Condition::ExactlyInterfaces(sets) => {
            sets.iter().any(|set| all_covered(set.patterns()))
        }
        _ => false,
    })
}

/// Whether the condition promises that each interface fits one of `patterns`, and that there is one.
fn only_these(known: &Condition, patterns: &[ClassPattern]) -> bool {
    match known {
        Condition::OnlyInterfaces(sets) | Condition::ExactlyInterfaces(sets) => {
            within(&flat(sets), patterns, |a, b| b.covers(*a))
        }
        _ => false,
    }
}

/// Whether the condition promises that no interface fits any of `patterns`.
fn none_of_these(known: &Condition, patterns: &[ClassPattern]) -> bool {
    match known {
        Condition::NoInterface(sets) => within(patterns, &flat(sets), |a, b| b.covers(*a)),
        Condition::OnlyInterfaces(sets) | Condition::ExactlyInterfaces(sets) => {
            !pairs(&flat(sets), patterns, |a, b| a.meet(*b).is_some())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::compile::compile;
    use crate::policy::load::load_one;
    use crate::topology::Topology;

    fn clause(text: &str) -> Clause {
        let text = format!("schema = 1\n[vms.a]\n[[assign]]\nvm = 'a'\nmatch = {{ {text} }}\n");
        let policy = load_one("policy.toml", &text).unwrap().policy;
        compile(&policy, &Topology::default()).rules[0].matcher.clauses[0].clone()
    }

    fn meet(left: &str, right: &str) -> bool {
        let (left, right) = (clause(left), clause(right));
        assert_eq!(can_meet(&[&left, &right]), can_meet(&[&right, &left]));
        can_meet(&[&left, &right])
    }

    #[test]
    fn different_ports_of_one_half_never_meet() {
        assert!(!meet("at = 'pci-0000:00:14.0/usb2:9'", "at = 'pci-0000:00:14.0/usb2:8'"));
        assert!(!meet("at = 'pci-0000:00:14.0/usb2:9'", "controller = '0000:01:00.0'"));
        assert!(meet("at = 'pci-0000:00:14.0/usb2:9'", "id = '0781:*'"));
    }

    #[test]
    fn halves_whose_peers_are_unknown_may_meet() {
        assert!(meet("at = 'pci-0000:00:14.0/usb2:9'", "at = 'pci-0000:00:14.0/usb3:4'"));
    }

    #[test]
    fn globs_and_ids_that_exclude_each_other_never_meet() {
        assert!(!meet("id = '0781:5581', serial = 'A*'", "id = '0781:5581', serial = 'B*'"));
        assert!(!meet("id = '0781:5581'", "id = ['0781:5582', '1234:*']"));
        assert!(meet("id = '0781:5581', serial = 'A*'", "id = '0781:5581', serial = '*B'"));
    }

    #[test]
    fn interface_sets_that_exclude_each_other_never_meet() {
        assert!(!meet("interfaces.only = ['storage']", "interfaces.any = ['hid']"));
        assert!(!meet("interfaces.none = ['hid']", "interfaces.all = ['storage', 'hid.keyboard']"));
        assert!(!meet("interfaces.only = ['storage']", "interfaces.only = ['audio']"));
        assert!(!meet("interfaces.exactly = ['storage']", "interfaces.none = ['08:06:50', '08']"));
        assert!(meet("interfaces.any = ['storage']", "interfaces.any = ['hid']"));
    }

    #[test]
    fn not_excludes_what_it_covers() {
        assert!(!meet("id = '0781:*', not = { id = '0781:5581' }", "id = '0781:5581'"));
        assert!(meet("id = '0781:*', not = { id = '0781:5581', speed = 'high' }", "id = '0781:5581'"));
    }

    #[test]
    fn hubs_are_nobodys() {
        let hub = clause("interfaces.any = ['hub']");
        assert!(!can_meet(&[&hub]));
    }

    #[test]
    fn narrow_implies_wide_and_not_the_other_way() {
        let narrow = clause("id = '0781:5581', interfaces.exactly = ['storage.bulk-only']");
        let wide = clause("id = '0781:*', interfaces.none = ['hid'], interfaces.any = ['storage']");
        assert!(implies(&[&narrow], &wide));
        assert!(!implies(&[&wide], &narrow));
    }
}
