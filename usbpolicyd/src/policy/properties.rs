//! Properties that hold for every policy and every device, tried on random ones.
//!
//! Policies and devices come from the same small domains, so that rules and devices meet often.

use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::compile::{CompiledPolicy, compile};
use super::decide::{Context, Verdict, decide};
use super::lint::lint;
use super::load::{Layer, Source, load, load_one};
use super::print;
use super::schema::Policy;
use crate::facts::tests::stick;
use crate::facts::{DeviceFacts, InterfaceFacts};
use crate::topology::{Controller, Half, HubPort, PortAddress, RootHub, Topology};

const PORTS: [&str; 8] = [
    "pci-0000:00:14.0/usb2:1",
    "pci-0000:00:14.0/usb3:3",
    "pci-0000:00:14.0/usb2:2",
    "pci-0000:00:14.0/usb2:2.1",
    "pci-0000:00:14.0/usb2:2.1.1",
    "pci-0000:00:14.0/usb3:4.1",
    "pci-0000:00:14.0/usb3:5",
    "platform-vhci_hcd.0/usb2:1",
];
const IDS: [&str; 4] = ["0781:5581", "0781:5582", "046d:c52b", "1234:0000"];
const SERIALS: [&str; 4] = ["A1", "A2", "B1", "B*"];
const CLASSES: [&str; 5] = ["08:06:50", "08:06:62", "03:01:01", "03:00:00", "09:00:00"];
const CLASS_WORDS: [&str; 6] = ["storage", "hid", "hid.keyboard", "08:06:50", "cdc", "vendor"];

/// Socket A is usb2:1 with usb3:3, socket B usb2:2 with usb3:4, a hub may be in B; usb3:5 is alone.
fn topology() -> Topology {
    let mut all = Topology::default();
    let controller: Controller = "pci-0000:00:14.0".parse().unwrap();
    all.buses.insert(1, RootHub { controller: controller.clone(), half: Half::Usb2 });
    all.buses.insert(2, RootHub { controller, half: Half::Usb3 });
    all.buses.insert(3, RootHub { controller: "platform-vhci_hcd.0".parse().unwrap(), half: Half::Usb2 });
    let mut port = |at: &str, peer: Option<&str>| {
        let peer = peer.map(|peer| peer.parse().unwrap());
        all.ports.insert(at.parse().unwrap(), HubPort { peer, ..HubPort::default() });
    };
    for (left, right) in [("usb2:1", "usb3:3"), ("usb2:2", "usb3:4")] {
        let (left, right) = (format!("pci-0000:00:14.0/{left}"), format!("pci-0000:00:14.0/{right}"));
        port(&left, Some(&right));
        port(&right, Some(&left));
    }
    port("pci-0000:00:14.0/usb3:5", None);
    port("platform-vhci_hcd.0/usb2:1", None);
    all
}

/// One value, or a list.
fn some_of(words: &'static [&'static str]) -> impl Strategy<Value = String> {
    subsequence(words, 1..=2.min(words.len())).prop_map(|chosen| format!("{chosen:?}"))
}

/// A random match table without and with `not`.
fn plain_match() -> impl Strategy<Value = String> {
    const PLACES: &[&str] =
        &[PORTS[0], PORTS[1], PORTS[3], PORTS[5], PORTS[7], "bench", "1-1", "002:4.1", "9-1"];
    let key = prop_oneof![
        4 => some_of(PLACES).prop_map(|at| format!("at = {at}")),
        3 => some_of(&["0781:5581", "0781:5582", "0781:*", "046d:*", "*:*"]).prop_map(|id| format!("id = {id}")),
        2 => some_of(&["A1", "A*", "*1", "?1", "B\\\\*"]).prop_map(|s| {
            format!("id = ['0781:*', '046d:c52b'], serial = {}", s.replace("\\\\\\\\", "\\\\"))
        }),
        1 => some_of(&["dongle", "other"]).prop_map(|device| format!("device = {device}")),
        1 => Just("controller = '0000:00:14.0'".to_owned()),
        1 => some_of(&["00", "ef:02", "03"]).prop_map(|class| format!("class = {class}")),
        1 => some_of(&["ultra*", "*fit", "*"]).prop_map(|product| format!("product = {product}")),
        1 => select(&["high", ">=super", "<=full"][..]).prop_map(|speed| format!("speed = '{speed}'")),
        1 => select(&["0", "\">=1\"", "[0, 2]"][..]).prop_map(|depth| format!("depth = {depth}")),
        3 => (select(&["any", "all", "only", "none", "exactly"][..]), some_of(&CLASS_WORDS))
            .prop_map(|(how, classes)| format!("interfaces.{how} = {classes}")),
    ];
    proptest::collection::vec(key, 1..=3).prop_map(|mut keys| {
        keys.sort_by_key(|key| key.split(" = ").next().map(str::to_owned));
        keys.dedup_by_key(|key| key.split(" = ").next().map(str::to_owned));
        keys.join(", ")
    })
}

fn any_match() -> impl Strategy<Value = String> {
    (plain_match(), proptest::option::weighted(0.2, plain_match())).prop_map(|(matches, not)| match not {
        Some(not) => format!("{{ {matches}, not = {{ {not} }} }}"),
        None => format!("{{ {matches} }}"),
    })
}

fn assign_rule() -> impl Strategy<Value = String> {
    let vms = select(&["vm = 'a'", "vm = 'b'", "vm = 'c'", "vms = ['a', 'b']"][..]);
    let more = select(
        &[
            "",
            "",
            "",
            "priority = 1\n",
            "mode = 'manual'\n",
            "on_conflict = 'last-used'\n",
            "reset = 'both'\n",
        ][..],
    );
    (vms, any_match(), more)
        .prop_map(|(vms, matches, more)| format!("[[assign]]\n{vms}\nmatch = {matches}\n{more}\n"))
}

fn deny_rule() -> impl Strategy<Value = String> {
    any_match().prop_map(|matches| format!("[[deny]]\nmatch = {matches}\n\n"))
}

fn rules() -> impl Strategy<Value = Vec<String>> {
    let rule = prop_oneof![6 => assign_rule(), 1 => deny_rule()];
    proptest::collection::vec(rule, 1..7)
}

/// Everything but the rules.
fn head() -> impl Strategy<Value = String> {
    proptest::option::weighted(0.3, any_match()).prop_map(|deny| {
        let deny = deny.map(|deny| format!("deny = [{deny}]\n")).unwrap_or_default();
        format!(
            "schema = 1\n[vms.a]\n{deny}[vms.b]\n[vms.c]\n\
             [connectors.bench]\nat = 'pci-0000:00:14.0/usb2:2'\nsubtree = true\n\
             [devices.dongle]\nid = '0781:5581'\nserial = 'A1'\nalso = ['1234:0000']\n\
             [devices.other]\nat = '1-1'\nid = '046d:*'\n\n"
        )
    })
}

fn device() -> impl Strategy<Value = DeviceFacts> {
    let interfaces = proptest::collection::vec(select(&CLASSES[..]), 0..3);
    let speed = select(&[common::ids::Speed::Full, common::ids::Speed::High, common::ids::Speed::Super][..]);
    let product = proptest::option::of(select(&["Ultra Fit", "ultra", "Receiver"][..]));
    (
        select(&PORTS[..]),
        select(&IDS[..]),
        proptest::option::of(select(&SERIALS[..])),
        interfaces,
        speed,
        product,
    )
        .prop_map(|(port, id, serial, classes, speed, product)| {
            let port: PortAddress = port.parse().unwrap();
            let topology = topology();
            let two_deep = port.chain.ports().len() == 2;
            let interface = stick("9").interfaces[0].clone();
            let of_class =
                |class: &str| InterfaceFacts { class: class.parse().unwrap(), ..interface.clone() };
            DeviceFacts {
                sys_name: topology.kernel_name(&port).unwrap().to_string(),
                controller: port.controller.clone(),
                connector: topology.connector(&port),
                chain: port.chain.clone(),
                id: id.parse().unwrap(),
                serial: serial.map(str::to_owned),
                product: product.map(str::to_owned),
                interfaces: classes.into_iter().map(of_class).collect(),
                speed,
                class: if two_deep { "00:00:00" } else { "ef:02:01" }.parse().unwrap(),
                ..stick("9")
            }
        })
}

fn devices() -> impl Strategy<Value = Vec<DeviceFacts>> {
    proptest::collection::vec(device(), 20)
}

fn read(text: &str) -> Policy {
    load_one("policy.toml", text).unwrap_or_else(|problems| panic!("{text}\n{}", problems[0])).policy
}

fn compiled(text: &str) -> CompiledPolicy {
    compile(&read(text), &topology())
}

/// What is decided, without the label of a rule, which tells its line.
fn outcome(policy: &CompiledPolicy, device: &DeviceFacts) -> String {
    match decide(policy, device, &Context::default()) {
        Verdict::Assign { vm, options, .. } => format!("assign {vm} {options:?}"),
        Verdict::Conflict { vms, .. } => format!("conflict {vms:?}"),
        Verdict::Manual { vms, .. } => format!("manual {vms:?}"),
        Verdict::Denied { .. } => "denied".to_owned(),
        other => format!("{other:?}"),
    }
}

/// A hundred cases of twenty devices each; `PROPTEST_CASES` asks for more.
fn config() -> ProptestConfig {
    let usual = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { usual.cases } else { 100 };
    ProptestConfig { cases, failure_persistence: None, ..usual }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn order_of_rules_never_matters(
        head in head(),
        (rules, shuffled) in rules().prop_flat_map(|rules| (Just(rules.clone()), Just(rules).prop_shuffle())),
        devices in devices(),
    ) {
        let first = compiled(&(head.clone() + &rules.concat()));
        let second = compiled(&(head + &shuffled.concat()));
        for device in &devices {
            prop_assert_eq!(outcome(&first, device), outcome(&second, device));
        }
    }

    #[test]
    fn spreading_rules_over_files_never_matters(head in head(), rules in rules(), devices in devices()) {
        let one = compiled(&(head.clone() + &rules.concat()));
        let mut sources = vec![Source { layer: Layer::Main, path: "policy.toml".into(), text: head }];
        for (index, rule) in rules.iter().rev().enumerate() {
            let layer = if index % 2 == 0 { Layer::Vendor } else { Layer::Local };
            sources.push(Source { layer, path: format!("{index}.toml"), text: format!("schema = 1\n{rule}") });
        }
        let many = compile(&load(&sources).unwrap().policy, &topology());
        for device in &devices {
            prop_assert_eq!(outcome(&one, device), outcome(&many, device));
        }
    }

    #[test]
    fn deny_never_creates_an_attach(head in head(), rules in rules(), deny in deny_rule(), devices in devices()) {
        let before = compiled(&(head.clone() + &rules.concat()));
        let after = compiled(&(head + &rules.concat() + &deny));
        for device in &devices {
            let (before, after) = (outcome(&before, device), outcome(&after, device));
            prop_assert!(after == before || after == "denied", "{} became {}", before, after);
        }
    }

    #[test]
    fn more_specific_rule_moves_devices_to_its_vm_only(head in head(), rules in rules(), devices in devices()) {
        let mut device = devices[0].clone();
        device.id = "0781:5581".parse().unwrap();
        let port = device.connector.halves.first().unwrap();
        let rule = format!(
            "[[assign]]\nvm = 'a'\npriority = 2\nmatch = {{ at = '{port}', id = '0781:5581' }}\n"
        );
        let before = compiled(&(head.clone() + &rules.concat()));
        let after = compiled(&(head + &rules.concat() + &rule));
        for device in devices.iter().chain([&device]) {
            let (before, after) = (outcome(&before, device), outcome(&after, device));
            prop_assert!(after == before || after.starts_with("assign a "), "{} became {}", before, after);
        }
    }

    #[test]
    fn no_device_ties_where_check_finds_no_tie(head in head(), rules in rules(), devices in devices()) {
        let policy = read(&(head + &rules.concat()));
        let topology = topology();
        let finds_tie = lint(&policy, Some(&topology)).iter().any(|one| one.code.starts_with("tie"));
        let compiled = compile(&policy, &topology);
        for device in &devices {
            let outcome = outcome(&compiled, device);
            prop_assert!(finds_tie || !outcome.starts_with("conflict"), "{}", outcome);
        }
    }

    #[test]
    fn no_device_wins_by_a_rule_that_check_calls_unreachable(
        head in head(), rules in rules(), devices in devices()
    ) {
        let policy = read(&(head + &rules.concat()));
        let topology = topology();
        let problems = lint(&policy, Some(&topology));
        let dead: Vec<u32> =
            problems.iter().filter(|one| one.code == "unreachable").map(|one| one.origin.as_ref().unwrap().line).collect();
        let compiled = compile(&policy, &topology);
        for device in &devices {
            if let Verdict::Assign { rule, .. } = decide(&compiled, device, &Context::default()) {
                prop_assert!(!dead.iter().any(|line| rule == format!("policy.toml:{line}")), "{} won", rule);
            }
        }
    }

    #[test]
    fn index_leaves_out_no_rule_that_matches(head in head(), rules in rules(), devices in devices()) {
        let policy = compiled(&(head + &rules.concat()));
        for device in &devices {
            let candidates = policy.candidates(device);
            for (number, rule) in policy.rules.iter().enumerate() {
                prop_assert!(rule.matcher.test(device).is_none() || candidates.contains(&number));
            }
        }
    }

    #[test]
    fn printed_policy_decides_the_same(head in head(), rules in rules(), devices in devices()) {
        let policy = read(&(head + &rules.concat()));
        let printed = print::policy(&policy);
        let again = read(&printed);
        prop_assert_eq!(print::policy(&again), printed);
        let (first, second) = (compile(&policy, &topology()), compile(&again, &topology()));
        for device in &devices {
            prop_assert_eq!(outcome(&first, device), outcome(&second, device));
        }
    }

    #[test]
    fn loader_survives_any_text(text in "\\PC*", rules in rules()) {
        let _ = load_one("policy.toml", &text);
        let mut broken = rules.concat();
        let at = text.len() % broken.len();
        if broken.is_char_boundary(at) {
            broken.insert_str(at, &text);
        }
        let _ = load_one("policy.toml", &format!("schema = 1\n{broken}"));
    }
}

/// The plainest way to match a glob, in exponential time.
fn slow_match(glob: &[char], text: &[char]) -> bool {
    match (glob, text) {
        ([], []) => true,
        (['*', rest @ ..], _) => {
            slow_match(rest, text) || matches!(text, [_, tail @ ..] if slow_match(glob, tail))
        }
        (['?', rest @ ..], [_, tail @ ..]) => slow_match(rest, tail),
        ([one, rest @ ..], [other, tail @ ..]) if one == other => slow_match(rest, tail),
        _ => false,
    }
}

proptest! {
    #[test]
    fn glob_matches_what_its_definition_says(glob in "[ab*?]{1,7}", text in "[ab]{0,8}") {
        let chars = |text: &str| text.chars().collect::<Vec<_>>();
        let wanted = slow_match(&chars(&glob), &chars(&text));
        prop_assert_eq!(super::pattern::Glob::new(&glob, false).unwrap().matches(&text), wanted);
    }

    #[test]
    fn globs_that_match_one_text_overlap_and_covering_is_kept(
        left in "[ab*?]{1,6}", right in "[ab*?]{1,6}", text in "[ab]{0,7}"
    ) {
        let (left, right) =
            (super::pattern::Glob::new(&left, false).unwrap(), super::pattern::Glob::new(&right, false).unwrap());
        let (in_left, in_right) = (left.matches(&text), right.matches(&text));
        prop_assert!(!(in_left && in_right) || left.overlaps(&right));
        prop_assert!(!(left.covers(&right) && in_right) || in_left);
    }
}
