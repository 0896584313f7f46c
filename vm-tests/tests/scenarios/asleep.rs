//! A host that sleeps, suspended to memory and woken by its clock. It is User-Mode Linux: the emulated host's root does
//! not survive a suspend. Its USB controller cuts the power of its ports meanwhile, so each nap is also a pull and a plug.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vm_tests::{daemons, uml};

/// The ids of the gadget.
const POLICY: &str = r#"
schema = 1
[vms.vm1]
[[assign]]
name = "stick"
vm = "vm1"
match = { id = "1d6b:0104" }
"#;

/// Two naps, each of some seconds.
const SCRIPT: &str = r#"
until_said() { until usbpolicyctl list | grep -q "$1"; do sleep 0.1; done; }
nap() {
    echo 0 > /sys/class/rtc/rtc0/wakealarm
    echo +$1 > /sys/class/rtc/rtc0/wakealarm
    echo mem > /sys/power/state
}
useradd --system --no-create-home --gid usbpolicyd usbvfiod-vm1
install -d -m 0750 -o usbvfiod-vm1 -g usbpolicyd /run/usbvfiod/vm1
$USBPOLICYD usbpolicyd --policy /stage/policy.toml > /tmp/usbpolicyd.log 2>&1 &
$USBVFIOD usbvfiod --socket-path /run/usbvfiod/vm1/vfio.sock --policy-socket /run/usbvfiod/vm1/policy.sock \
    > /tmp/usbvfiod.log 2>&1 &
truncate --size 8M /tmp/disk
gadget up stick --function storage --file /tmp/disk --speed super
until_said 'with vm1'

echo "nap with the stick in its VM"
nap 4
until [ $(usbpolicyctl log | grep -c 'attached') = 2 ]; do sleep 0.1; done

echo "nap without it"
gadget unplug stick
until_said 'no devices'
nap 3
until [ $(usbpolicyctl log | grep -c 'the host slept') = 2 ]; do sleep 0.1; done
gadget plug stick
until_said 'with vm1'
usbpolicyctl log
echo "what else was said:"
dmesg | grep -e PM: -e usb
cat /tmp/usbpolicyd.log /tmp/usbvfiod.log
"#;

/// The kernel that is made first takes longer, and that is not counted.
const WITHIN: Duration = Duration::from_secs(120);

#[test]
#[ignore = "makes a kernel first, once, for ten minutes or so"]
fn devices_are_with_their_vm_again_after_the_host_slept() -> Result<()> {
    let script = format!(
        "USBPOLICYD='{}'\nUSBVFIOD='{}'\n({})\n{SCRIPT}",
        daemons::as_user("usbpolicyd").join(" "),
        daemons::as_user("usbvfiod-vm1").join(" "),
        daemons::INSTALL,
    );
    let programs = ["usbpolicyd", "usbpolicyctl", "usbvfiod", "gadget"];
    let said = uml::run(&programs, &[("policy.toml", POLICY)], &script, WITHIN)?;
    println!("{said}");
    let (log, _) = said.split_once("what else was said:").context("the log has no end")?;
    let slept: Vec<u32> = log
        .lines()
        .filter_map(|line| line.split_once("the host slept for ")?.1.split_once(" s;")?.0.parse().ok())
        .collect();
    ensure!(matches!(slept.as_slice(), [2..=6, 1..=5]), "naps of 4 and 3 s were seen as {slept:?}");
    let of = |word: &str| log.matches(word).count();
    ensure!((of("attached"), of("detached"), of("resumed")) == (3, 2, 2), "more happened, or less: {log}");
    Ok(())
}
