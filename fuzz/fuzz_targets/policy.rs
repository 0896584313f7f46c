//! Any text as a policy: it is refused, or it prints and loads again, and decides about a device the same both times.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use usbpolicyd::facts::Snapshot;
use usbpolicyd::policy::compile::compile;
use usbpolicyd::policy::decide::{Context, Verdict, decide};
use usbpolicyd::policy::explain::explain;
use usbpolicyd::policy::lint::lint;
use usbpolicyd::policy::load::load_one;
use usbpolicyd::policy::print;

/// A host with a dozen devices; it outlives every run.
static HOST: LazyLock<Snapshot> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../../usbpolicyd/tests/data/office-host.json")).unwrap()
});

fuzz_target!(|text: &str| {
    let Ok(loaded) = load_one("policy.toml", text) else { return };
    let again = load_one("policy.toml", &print::policy(&loaded.policy)).unwrap();
    let (first, second) =
        (compile(&loaded.policy, &HOST.topology), compile(&again.policy, &HOST.topology));
    let tie = lint(&loaded.policy, Some(&HOST.topology)).iter().any(|one| one.code.starts_with("tie"));
    let context = Context::default();
    for device in &HOST.devices {
        let verdict = decide(&first, device, &context);
        assert_eq!(verdict, explain(&first, device, &context).decision);
        assert_eq!(outcome(&verdict), outcome(&decide(&second, device, &context)));
        assert!(tie || !matches!(verdict, Verdict::Conflict { .. }));
        assert!(!device.is_hub() || matches!(verdict, Verdict::Protected { .. }));
    }
});

/// The verdict without the labels of rules, which tell their lines.
fn outcome(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Assign { vm, options, .. } => format!("assign {vm} {options:?}"),
        Verdict::Unexpected { vm, why, .. } => format!("unexpected {vm} {why}"),
        Verdict::Conflict { vms, .. } => format!("conflict {vms:?}"),
        Verdict::Manual { vms, .. } => format!("manual {vms:?}"),
        Verdict::Denied { reason, .. } => format!("denied {}", reason.is_some()),
        other => format!("{other:?}"),
    }
}
