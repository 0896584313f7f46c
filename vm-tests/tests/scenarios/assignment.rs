//! Which VM gets which device, and that nothing but the policy and the plug ever changes it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vm_tests::injection::Injection;
use vm_tests::scenarios::Client;
use vm_tests::{Guest, Host, HostConfig, Plugged, UsbDevice, Usbpolicyd, Usbvfiod, progress, scenario};

const STICKS_TO_VM1: &str = r#"
schema = 1
[vms.vm1]
[[assign]]
vm = "vm1"
match = { id = "46f4:0001" }
"#;

/// Giving a device back takes half a dozen of them.
const SLOW_CALL: Duration = Duration::from_millis(500);

/// A policy that gives each connector to a VM.
fn by_connector(rules: &[(&Plugged, &str)]) -> String {
    let mut policy = "schema = 1\n[vms.vm1]\n[vms.vm2]\n".to_owned();
    for (plugged, vm) in rules {
        policy += &format!("[[assign]]\nvm = \"{vm}\"\nmatch = {{ at = \"{}\" }}\n", plugged.connector());
    }
    policy
}

/// The driver of the host for a stick's only interface; empty if it has none.
fn host_driver(host: &Host, stick: &Plugged) -> Result<String> {
    let name = host.kernel_name(stick)?;
    host.run(&format!("basename \"$(readlink /sys/bus/usb/devices/{name}:1.0/driver)\""))
}

#[test]
fn two_identical_sticks_are_told_apart_by_port() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let left = host.plug(UsbDevice::stick("left").serial("TWIN").port("1"))?;
        let right = host.plug(UsbDevice::stick("right").serial("TWIN").port("2"))?;
        let _policy = Usbpolicyd::start(host, &by_connector(&[(&left, "vm1"), (&right, "vm2")]))?;
        let _controllers = [Usbvfiod::start(host, "vm1")?, Usbvfiod::start(host, "vm2")?];
        let first = Guest::launch(host, &Client::Qemu.guest("vm1"))?;
        let second = Guest::launch(host, &Client::Qemu.guest("vm2"))?;
        first.wait_boot_after(0)?;
        second.wait_boot_after(0)?;
        first.check_content(&left)?;
        second.check_content(&right)
    })
}

#[test]
fn a_device_that_no_rule_names_stays_with_the_host() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let mine = host.plug(UsbDevice::stick("mine").port("1"))?;
        let named = host.plug(UsbDevice::stick("named").port("2"))?;
        let _policy = Usbpolicyd::start(host, &by_connector(&[(&named, "vm1")]))?;
        let _controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &Client::Qemu.guest("vm1"))?;
        // When this one is in the guest, the decision about the other has been made.
        guest.check_content(&named)?;
        ensure!(!guest.has(&mine)?, "the guest has a device that no rule names");
        assert_eq!(host_driver(host, &mine)?, "usb-storage");
        let sum = host
            .run("sha256sum < $(ls /dev/disk/by-id/usb-*MINE* 2>/dev/null || ls /dev/sd?) | cut -d' ' -f1")?;
        assert_eq!(sum, mine.sha256(), "the host reads its own stick");
        Ok(())
    })
}

#[test]
fn the_order_of_vm_and_usbpolicyd_does_not_matter() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let stick = host.plug(UsbDevice::stick("stick1"))?;
        let controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &Client::Qemu.guest("vm1"))?;
        ensure!(!guest.has(&stick)?, "nobody has decided anything yet");

        let policy = Usbpolicyd::start(host, STICKS_TO_VM1)?;
        guest.check_content(&stick)?;

        // The VM goes: the host gets its stick back. Another VM of this name comes: it has the stick.
        guest.stop()?;
        controller.stop()?;
        wait_driver(host, &stick, "usb-storage")?;
        let controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &Client::Qemu.guest("vm1"))?;
        guest.check_content(&stick)?;

        // Both are told to end: usbpolicyd has not given the stick back by then, and does so before it goes.
        guest.stop()?;
        let slow = Injection::slow(host, "usbpolicyd", "ioctl", SLOW_CALL)?;
        controller.stop()?;
        policy.stop()?;
        slow.release()?;
        wait_driver(host, &stick, "usb-storage")
    })
}

#[test]
fn usbpolicyd_killed_during_a_copy_harms_nothing() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let policy = Usbpolicyd::start(host, STICKS_TO_VM1)?;
        let _controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &Client::Qemu.guest("vm1"))?;
        let stick = host.plug(UsbDevice::stick("stick1"))?;
        let disk = guest.wait_disk(&stick)?;
        let medium = stick.medium.as_ref().context("a stick has a medium")?;

        let before = guest.here();
        let rounds = 4;
        let copy = guest.start_copy(&disk, rounds)?;
        guest.wait_read_from(&disk, 2 << 20)?;
        policy.kill()?;
        guest.wait_read_from(&disk, 6 << 20)?;
        let _policy = Usbpolicyd::start_again(host)?;
        ensure!(copy.is_running(), "the copy was over before usbpolicyd was back: make it longer");
        assert_eq!(copy.finish(Duration::from_secs(600))?, medium.sha256_repeated(rounds)?);
        assert_eq!(guest.kernel_log().all_after(before, "USB disconnect"), [""; 0]);

        // And the new one does its work.
        host.unplug(&stick)?;
        guest.wait_line_after(before, "USB disconnect", Duration::from_secs(20))?;
        guest.wait_gone(&stick)?;
        host.replug(&stick)?;
        guest.check_content(&stick)
    })
}

#[test]
fn a_reload_moves_nothing_that_did_not_change() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let steady = host.plug(UsbDevice::stick("steady").port("1"))?;
        let leaving = host.plug(UsbDevice::stick("leaving").port("2"))?;
        let policy = Usbpolicyd::start(host, &by_connector(&[(&steady, "vm1"), (&leaving, "vm1")]))?;
        let _controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &Client::Qemu.guest("vm1"))?;
        let disk = guest.wait_disk(&steady)?;
        guest.wait_disk(&leaving)?;
        let medium = steady.medium.as_ref().context("a stick has a medium")?;

        let before = guest.here();
        let rounds = 4;
        let copy = guest.start_copy(&disk, rounds)?;
        policy.reload(host, &by_connector(&[(&steady, "vm1")]))?;
        guest.wait_line_after(before, "USB disconnect", Duration::from_secs(30))?;
        wait_driver(host, &leaving, "usb-storage")?;

        policy.reload(host, "schema = 1\n[vms.vm1]\nnonsense = true\n")?;
        policy.log().wait("nonsense", Duration::from_secs(30))?;
        ensure!(copy.is_running(), "the copy was over before the reloads were: make it longer");
        assert_eq!(copy.finish(Duration::from_secs(600))?, medium.sha256_repeated(rounds)?);
        assert_eq!(guest.kernel_log().all_after(before, "USB disconnect").len(), 1, "only one stick left");
        Ok(())
    })
}

/// Waits until the host has (or no longer has) a driver on a stick.
fn wait_driver(host: &Host, stick: &Plugged, wanted: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let driver = host_driver(host, stick)?;
        if driver == wanted {
            progress(&format!("the host drives {} with {driver}", stick.device.name()));
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{} is driven by {driver:?}, not {wanted:?}", stick.device.name());
    }
}
