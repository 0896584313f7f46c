use super::*;
use crate::facts::tests::stick;
use crate::facts::{HostUse, HostUseKind};
use crate::policy::compile::compile;
use crate::policy::load::load_one;
use crate::topology::Topology;

fn policy(text: &str) -> CompiledPolicy {
    let text = format!("schema = 1\n[vms.a]\n[vms.b]\n{text}");
    compile(&load_one("policy.toml", &text).unwrap().policy, &Topology::default())
}

fn vm(name: &str) -> VmName {
    name.parse().unwrap()
}

/// `a by rule`, `conflict a b`, `denied rule`, …: short enough to compare.
fn said(verdict: &Verdict) -> String {
    let names = |vms: &[VmName]| vms.iter().map(VmName::as_str).collect::<Vec<_>>().join(" ");
    match verdict {
        Verdict::Assign { vm, rule, .. } => format!("{vm} by {rule}"),
        Verdict::Conflict { vms, .. } => format!("conflict {}", names(vms)),
        Verdict::Manual { vms, .. } => format!("manual {}", names(vms)),
        Verdict::Denied { rule, .. } => format!("denied {rule}"),
        Verdict::Protected { why } => format!("protected: {why}"),
        Verdict::Busy { why } => format!("busy: {why}"),
        Verdict::Unexpected { why, .. } => format!("unexpected: {why}"),
        Verdict::Kept { actor } => format!("kept by {actor}"),
        Verdict::Host => "host".to_owned(),
    }
}

fn plain(text: &str, device: &DeviceFacts) -> String {
    said(&decide(&policy(text), device, &Context::default()))
}

const BY_ID: &str = "[[assign]]\nname = 'by-id'\nvm = 'a'\nmatch = { id = '0781:5581' }\n";
const BY_PORT: &str = "[[assign]]\nname = 'by-port'\nvm = 'b'\nmatch = { at = 'pci-0000:00:14.0/usb2:9' }\n";
const BOTH_BY_ID: &str = "[[assign]]\nname = 'both'\nvms = ['a', 'b']\nmatch = { id = '0781:5581' }\n";

#[test]
fn device_that_no_rule_names_stays_with_the_host() {
    assert_eq!(plain("", &stick("9")), "host");
    assert_eq!(plain(BY_PORT, &stick("9.1")), "host");
}

#[test]
fn port_beats_id_and_both_beat_either() {
    let both =
        "[[assign]]\nname = 'both'\nvm = 'a'\nmatch = { id = '0781:5581', at = 'pci-0000:00:14.0/usb2:9' }\n";
    assert_eq!(plain(&format!("{BY_ID}{BY_PORT}"), &stick("9")), "b by by-port");
    assert_eq!(plain(&format!("{BY_PORT}{BY_ID}{both}"), &stick("9")), "a by both");
    assert_eq!(plain(&format!("{BY_PORT}{BY_ID}"), &stick("8")), "a by by-id");
}

#[test]
fn priority_beats_specificity() {
    let first = BY_ID.replace("vm =", "priority = 1\nvm =");
    assert_eq!(plain(&format!("{BY_PORT}{first}"), &stick("9")), "a by by-id");
}

#[test]
fn deny_beats_every_priority() {
    let deny = "[[deny]]\nname = 'no'\nmatch = { id = '0781:*' }\n";
    let first = BY_ID.replace("vm =", "priority = 1000\nvm =");
    assert_eq!(plain(&format!("{first}{deny}"), &stick("9")), "denied no");
}

#[test]
fn own_deny_of_a_vm_leaves_the_device_to_the_other() {
    let text = format!("{BOTH_BY_ID}[vms.a2]\n");
    let denies = text
        .replace("[vms.a2]", "[vms.c]\ndeny = [{ interfaces.any = ['storage'] }]")
        .replace("'a', ", "'c', ");
    assert_eq!(plain(&denies, &stick("9")), "b by both");
}

#[test]
fn hub_is_protected_from_every_rule() {
    let mut hub = stick("9");
    hub.interfaces[0].class = "09:00:00".parse().unwrap();
    assert!(plain(&format!("{BY_ID}{BY_PORT}"), &hub).starts_with("protected: it is a hub"));
}

#[test]
fn equal_claims_are_a_conflict_that_the_holder_survives() {
    let policy = policy(BOTH_BY_ID);
    let device = stick("9");
    let held = Context { holder: Some(vm("b")), ..Context::default() };
    assert_eq!(said(&decide(&policy, &device, &Context::default())), "conflict a b");
    assert_eq!(said(&decide(&policy, &device, &held)), "b by both");
}

#[test]
fn tie_goes_to_the_vm_that_was_first_or_had_it_last() {
    let device = stick("9");
    let context = Context { up: vec![vm("b"), vm("a")], last_holder: Some(vm("a")), ..Context::default() };
    let with = |how: &str| policy(&BOTH_BY_ID.replace("vms", &format!("on_conflict = '{how}'\nvms")));
    assert_eq!(said(&decide(&with("first-come"), &device, &context)), "b by both");
    assert_eq!(said(&decide(&with("last-used"), &device, &context)), "a by both");
    assert_eq!(said(&decide(&with("last-used"), &device, &Context::default())), "conflict a b");
}

#[test]
fn better_claim_takes_a_held_device_only_with_preempt() {
    let device = stick("9");
    let held = Context { holder: Some(vm("a")), ..Context::default() };
    let polite = policy(&format!("{BY_ID}{BY_PORT}"));
    let rude = policy(&format!("{BY_ID}{}", BY_PORT.replace("vm =", "preempt = true\nvm =")));
    assert_eq!(said(&decide(&polite, &device, &held)), "a by by-id");
    assert_eq!(said(&decide(&rude, &device, &held)), "b by by-port");
}

#[test]
fn holder_without_any_claim_loses_the_device() {
    let held = Context { holder: Some(vm("a")), ..Context::default() };
    assert_eq!(said(&decide(&policy(BY_PORT), &stick("9"), &held)), "b by by-port");
}

#[test]
fn manual_waits_for_an_order_and_then_stays() {
    let policy = policy(&BOTH_BY_ID.replace("vms", "mode = 'manual'\nvms"));
    let device = stick("9");
    let order = Some(Order::Attach { vm: vm("b"), actor: "alice".into() });
    let ordered = Context { order, ..Context::default() };
    let held = Context { holder: Some(vm("b")), ..Context::default() };
    assert_eq!(said(&decide(&policy, &device, &Context::default())), "manual a b");
    assert_eq!(said(&decide(&policy, &device, &ordered)), "b by both");
    assert_eq!(said(&decide(&policy, &device, &held)), "b by both");
}

#[test]
fn order_needs_no_rule_but_cannot_pass_a_deny_or_a_guard() {
    let order = Some(Order::Attach { vm: vm("a"), actor: "alice".into() });
    let context = Context { order, ..Context::default() };
    let mut busy = stick("9");
    let used = HostUse { kind: HostUseKind::Open, level: HostUseLevel::Busy, why: "in use".into() };
    busy.host_use.push(used);
    let free = policy("");
    let deny = policy("[[deny]]\nname = 'no'\nmatch = { id = '0781:*' }\n");
    assert_eq!(said(&decide(&free, &stick("9"), &context)), "a by order");
    assert_eq!(said(&decide(&deny, &stick("9"), &context)), "denied no");
    assert_eq!(said(&decide(&free, &busy, &context)), "busy: in use");
}

#[test]
fn protected_use_gives_way_only_to_a_rule_that_names_device_and_use() {
    let mut disk = stick("9");
    let why = "sdb1 is mounted on /".to_owned();
    disk.host_use.push(HostUse { kind: HostUseKind::Storage, level: HostUseLevel::Protected, why });
    let by_port = BY_PORT.replace("vm =", "allow_in_use = ['storage']\nvm =");
    let by_name =
        "[devices.disk]\nid = '0781:5581'\n[[assign]]\nname = 'n'\nvm = 'a'\nmatch.device = 'disk'\n";
    assert_eq!(plain(&by_port, &disk), "protected: sdb1 is mounted on /");
    assert_eq!(plain(by_name, &disk), "protected: sdb1 is mounted on /");
    assert_eq!(plain(&format!("{by_name}allow_in_use = ['storage']"), &disk), "a by n");
}

#[test]
fn busy_device_that_becomes_free_waits_or_not() {
    let was_busy = Context { was_busy: true, ..Context::default() };
    let refuse = policy(&format!("{BY_PORT}[protect]\nin_use = 'refuse'\n"));
    assert_eq!(said(&decide(&policy(BY_PORT), &stick("9"), &was_busy)), "b by by-port");
    assert_eq!(said(&decide(&refuse, &stick("9"), &was_busy)), "busy: the host used it; plug it in again");
}

#[test]
fn device_is_followed_into_another_identity() {
    let mut flashed = stick("9");
    flashed.id = "0483:df11".parse().unwrap();
    let context = Context { follow: Some((vm("a"), "by-id".into())), ..Context::default() };
    let follows = policy(&BY_ID.replace("vm =", "follow = '10s'\nvm ="));
    assert_eq!(said(&decide(&follows, &flashed, &context)), "a by by-id");
    assert_eq!(said(&decide(&policy(BY_ID), &flashed, &context)), "host");
}

#[test]
fn other_identity_of_a_named_device_needs_the_same_place_but_not_the_same_serial() {
    let text = "[devices.dongle]\nid = '0781:5581'\nserial = '4C53*'\nalso = ['0483:df11']\n\
                at = 'pci-0000:00:14.0/usb2:9'\n[[assign]]\nname = 'd'\nvm = 'a'\nmatch.device = '@dongle'\n";
    let mut flashed = stick("9");
    flashed.id = "0483:df11".parse().unwrap();
    flashed.serial = None;
    let mut elsewhere = stick("8");
    elsewhere.id = flashed.id;
    assert_eq!(plain(text, &stick("9")), "a by d");
    assert_eq!(plain(text, &flashed), "a by d");
    assert_eq!(plain(text, &elsewhere), "host");
}

#[test]
fn unexpected_device_in_the_right_place_is_not_attached() {
    let text = format!("{BY_PORT}expect = {{ serial = 'other' }}\n");
    assert_eq!(plain(&text, &stick("9")), "unexpected: its serial number is another");
}

#[test]
fn subtree_takes_what_is_below_the_hub() {
    let text = "[connectors.bench]\nat = 'pci-0000:00:14.0/usb2:4'\nsubtree = true\n\
                [[assign]]\nname = 'bench'\nvm = 'a'\nmatch.at = 'bench'\n";
    assert_eq!(plain(text, &stick("4.1.2")), "a by bench");
    assert_eq!(plain(text, &stick("5.1")), "host");
}

#[test]
fn rule_for_one_half_takes_the_device_on_the_other() {
    let mut fast = stick("9");
    fast.connector.halves.insert("pci-0000:00:14.0/usb3:4".parse().unwrap());
    let other_half = BY_PORT.replace("usb2:9", "usb3:4");
    assert_eq!(plain(&other_half, &fast), "b by by-port");
}

#[test]
fn kernel_name_of_an_unknown_bus_means_that_name_only() {
    let text = BY_PORT.replace("pci-0000:00:14.0/usb2:9", "1-9");
    assert_eq!(plain(&text, &stick("9")), "b by by-port");
    assert_eq!(plain(&text.replace("1-9", "001:9"), &stick("9")), "b by by-port");
    assert_eq!(plain(&text.replace("1-9", "2-9"), &stick("9")), "host");
}
