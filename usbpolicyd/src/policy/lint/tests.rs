use super::*;
use crate::policy::load::load_one;
use crate::topology::{Half, HubPort, RootHub};

fn policy(text: &str) -> Policy {
    load_one("policy.toml", &format!("schema = 1\n[vms.a]\n[vms.b]\n{text}")).unwrap().policy
}

/// Codes of what is found, without notes of what nobody uses.
fn found(text: &str) -> Vec<&'static str> {
    let all = lint(&policy(text), None);
    all.iter().map(|one| one.code).filter(|code| *code != "unused").collect()
}

fn rule(vm: &str, matches: &str) -> String {
    format!("[[assign]]\nvm = '{vm}'\nmatch = {{ {matches} }}\n")
}

/// A controller with sockets usb2:9 = usb3:4 and usb2:10.
fn topology() -> Topology {
    let mut all = Topology::default();
    let port = |text: &str| -> PortAddress { text.parse().unwrap() };
    for (bus, half) in [(1, Half::Usb2), (2, Half::Usb3)] {
        all.buses.insert(bus, RootHub { controller: "0000:00:14.0".parse().unwrap(), half });
    }
    let (two, three) = (port("pci-0000:00:14.0/usb2:9"), port("pci-0000:00:14.0/usb3:4"));
    all.ports.insert(two.clone(), HubPort { peer: Some(three.clone()), ..HubPort::default() });
    all.ports.insert(three, HubPort { peer: Some(two), ..HubPort::default() });
    all.ports.insert(port("pci-0000:00:14.0/usb2:10"), HubPort::default());
    all
}

const ID: &str = "id = '0781:5581'";
const PORT: &str = "at = 'pci-0000:00:14.0/usb2:9'";

#[test]
fn equal_claims_of_two_vms_tie_and_those_of_one_do_not() {
    assert_eq!(found(&(rule("a", ID) + &rule("b", ID))), ["tie"]);
    assert!(found(&(rule("a", ID) + &rule("a", ID))).is_empty());
    assert!(found(&(rule("a", ID) + &rule("b", PORT))).is_empty());
}

#[test]
fn rule_with_two_vms_ties_with_itself_unless_it_is_manual_or_settled() {
    let both = |more: &str| format!("[[assign]]\nvms = ['a', 'b']\nmatch = {{ {ID} }}\n{more}\n");
    assert_eq!(found(&both("")), ["tie"]);
    assert_eq!(found(&both("on_conflict = 'first-come'")), ["tie-settled"]);
    assert!(found(&both("mode = 'manual'")).is_empty());
}

#[test]
fn rules_that_settle_ties_differently_tie() {
    let with = |vm: &str, how: &str| rule(vm, ID) + &format!("on_conflict = '{how}'\n");
    assert_eq!(found(&(with("a", "first-come") + &with("b", "last-used"))), ["tie"]);
}

#[test]
fn id_and_class_rules_tie_only_at_equal_rank() {
    let any_storage = "interfaces.any = ['storage']";
    let any_input = "interfaces.any = ['hid']";
    assert!(found(&(rule("a", any_storage) + &rule("b", any_input))).contains(&"tie"));
    let ranked = rule("a", any_storage) + "priority = 1\n" + &rule("b", any_input);
    assert!(!found(&ranked).contains(&"tie"));
}

#[test]
fn tie_is_gone_when_a_deny_or_a_better_claim_has_all_of_it() {
    let tied = rule("a", ID) + &rule("b", ID);
    let denied = "[[deny]]\nmatch = { id = '0781:*' }\n";
    let better = rule("a", ID) + "priority = 1\n";
    let partly = "[[deny]]\nmatch = { id = '0781:5581', speed = 'high' }\n";
    assert!(!found(&(tied.clone() + denied)).contains(&"tie"));
    assert!(!found(&(tied.clone() + &better)).contains(&"tie"));
    assert!(found(&(tied + partly)).contains(&"tie"));
}

#[test]
fn tie_is_gone_when_one_vm_denies_all_of_it() {
    let text = rule("a", ID) + &rule("c", ID) + "[vms.c]\ndeny = [{ id = '0781:*' }]\n";
    assert!(!found(&text).contains(&"tie"));
}

#[test]
fn one_socket_by_either_half_ties_only_where_the_halves_are_known() {
    let text = rule("a", PORT) + &rule("b", "at = 'pci-0000:00:14.0/usb3:4'");
    let apart = rule("a", "at = 'pci-0000:00:14.0/usb2:10'") + &rule("b", "at = 'pci-0000:00:14.0/usb3:4'");
    let ties = |text: &str, topology: Option<&Topology>| {
        lint(&policy(text), topology).iter().any(|one| one.code == "tie")
    };
    assert!(ties(&text, Some(&topology())));
    assert!(ties(&apart, None));
    assert!(!ties(&apart, Some(&topology())));
}

#[test]
fn kernel_name_is_unstable_and_its_stable_form_is_told() {
    let problems = lint(&policy(&rule("a", "at = '2-4'")), Some(&topology()));
    let unstable = problems.iter().find(|one| one.code == "unstable-port").unwrap();
    assert_eq!(unstable.help.as_deref(), Some("write pci-0000:00:14.0/usb3:4"));
}

#[test]
fn port_that_the_host_has_not_is_missing() {
    let codes = |at: &str| -> Vec<&str> {
        let policy = policy(&rule("a", &format!("at = '{at}'")));
        lint(&policy, Some(&topology())).iter().map(|one| one.code).filter(|one| *one != "unused").collect()
    };
    assert!(codes("pci-0000:00:14.0/usb2:9.4.1").is_empty());
    assert_eq!(codes("pci-0000:00:14.0/usb2:11"), ["missing-port"]);
    assert_eq!(codes("pci-0000:01:00.0/usb2:9"), ["missing-port"]);
}

#[test]
fn rule_below_a_deny_or_a_better_rule_is_unreachable() {
    let deny = "[[deny]]\nname = 'no'\nmatch = { id = '0781:*' }\n";
    let better = rule("b", "id = '0781:5581', at = 'pci-0000:00:14.0/usb2:9'") + "priority = 1\n";
    let wider = rule("b", "id = '0781:*'") + "priority = 1\n";
    assert_eq!(found(&(rule("a", ID) + deny)), ["unreachable"]);
    assert_eq!(found(&(rule("a", ID) + &wider)), ["unreachable"]);
    assert!(found(&(rule("a", ID) + &better)).is_empty());
}

#[test]
fn rule_that_no_device_fits_is_unreachable() {
    assert_eq!(found(&rule("a", "id = '0781:5581', interfaces.all = ['hub']")), ["unreachable"]);
    assert_eq!(
        found(&rule("a", "at = 'pci-0000:00:14.0/usb2:9', controller = '0000:01:00.0'")),
        ["unreachable"]
    );
}

#[test]
fn names_and_classes_alone_are_weak_and_ids_are_for_trusted_vms() {
    let trusted = |matches: &str| found(&(rule("c", matches) + "[vms.c]\ntrust = 50\n"));
    assert_eq!(found(&rule("a", "product = '*stick*'")), ["weak-selector"]);
    assert_eq!(found(&rule("a", "interfaces.only = ['storage']")), ["weak-selector"]);
    assert!(found(&rule("a", ID)).is_empty());
    assert_eq!(trusted(ID), ["weak-selector"]);
    assert!(trusted(PORT).is_empty());
    assert!(trusted(&format!("{ID}, interfaces.only = ['storage']")).is_empty());
}

#[test]
fn protected_use_without_a_name_is_told() {
    let with = |used: &str| found(&(rule("a", PORT) + &format!("allow_in_use = ['{used}']\n")));
    assert_eq!(with("storage"), ["allow-in-use"]);
    assert!(with("open").is_empty());
}

#[test]
fn equal_rules_of_one_vm_with_other_options_are_told() {
    assert_eq!(found(&(rule("a", ID) + &rule("a", ID) + "reset = 'both'\n")), ["equal-rules"]);
}

#[test]
fn declared_and_never_used_is_told() {
    let text = "[connectors.left]\nat = 'pci-0000:00:14.0/usb2:9'\n[devices.x]\nid = '0781:5581'\n";
    let codes: Vec<&str> = lint(&policy(text), None).iter().map(|one| one.code).collect();
    assert_eq!(codes, ["unused"; 4]);
}

#[test]
fn policy_full_of_ties_is_told_in_bounded_time_and_space() {
    let text: String = (0..300).map(|n| rule(if n % 2 == 0 { "a" } else { "b" }, ID)).collect();
    assert_eq!(found(&text).len(), 51);
}
