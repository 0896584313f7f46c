//! From a plug to the file at the instance, on the real processor of this machine.

use anyhow::{Context, Result};
use vm_tests::{daemons, uml};

use super::contender::LATENCY;
use super::table::Table;
use super::{HANDOVERS, WITHIN, add_hand_overs};

/// Here the gadget is the only keyboard of the host.
const POLICY: &str = r#"
schema = 1
[vms.latency]
[devices.keyboard]
id = "1d6b:0108"
[[assign]]
vm = "latency"
match = { device = "@keyboard" }
allow_in_use = ["input"]
"#;

/// Plugs a keyboard gadget again and again.
pub(crate) fn hand_overs(rounds: u32, table: &mut Table) -> Result<()> {
    let rounds = rounds.saturating_mul(HANDOVERS);
    // Who takes the times comes first of all, so that it sees an event when it comes.
    let script = format!(
        "{install}\n{nice} {as_user} usbpolicyd --policy /stage/policy.toml > /tmp/usbpolicyd.log 2>&1 &\n\
         nice -n -15 hand-over-latency {rounds} {LATENCY} || {{ cat /tmp/usbpolicyd.log; exit 1; }}",
        install = daemons::INSTALL,
        nice = daemons::BEFORE_UDEV.join(" "),
        as_user = daemons::as_user("usbpolicyd").join(" "),
    );
    let said = uml::run(&["usbpolicyd", "hand-over-latency"], &[("policy.toml", POLICY)], &script, WITHIN)?;
    let last = said.lines().last().context("hand-over-latency said nothing")?;
    add_hand_overs(last, "usbpolicyd, not emulated", table)
}
