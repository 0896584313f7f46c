//! A keyboard: interrupt transfers that wait for a person, also while the guest has suspended it. And a stick that sleeps,
//! down to the host's own port.

use std::time::Duration;

use anyhow::{Context, Result};
use vm_tests::remote::Remote;
use vm_tests::scenarios::Client;
use vm_tests::{Guest, HostConfig, UsbDevice, Usbpolicyd, Usbvfiod, on_each_client, progress, scenario};

const POLICY: &str = r#"
schema = 1
[vms.vm1]
[[assign]]
vm = "vm1"
match = { id = ["0627:0001", "46f4:0001"] }
"#;

/// A suspend or a resume, and what a busy machine makes of it.
const ASLEEP_WITHIN: Duration = Duration::from_secs(60);

on_each_client!(keys_reach_the_guest);

fn keys_reach_the_guest(client: Client) -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let _controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &client.guest("vm1"))?;
        let before = guest.here();
        host.plug(UsbDevice::keyboard("keyboard1").port("3"))?;
        let keys = guest.read_keys(before, 3)?;
        host.press(&["a", "b", "ret"])?;
        // KEY_A, KEY_B, KEY_ENTER.
        let expected = [(30, 1), (30, 0), (48, 1), (48, 0), (28, 1), (28, 0)];
        assert_eq!(keys.finish(Duration::from_secs(20))?, expected);

        // Remote wake-up: the port is in U3, nobody in the guest asks for keys, and still none is lost.
        let keys = guest.read_keys(before, 2)?;
        let keyboard = directory_of(guest.remote(), "idVendor", "0627")?;
        sleep(guest.remote(), &keyboard)?;
        progress("the guest has suspended the keyboard");
        host.press(&["c", "d"])?;
        // KEY_C, KEY_D.
        assert_eq!(keys.finish(ASLEEP_WITHIN)?, [(46, 1), (46, 0), (32, 1), (32, 0)]);
        progress("its keys woke the guest");

        // Suspend through usbfs: where the operator lets the host suspend the device, it sleeps there too.
        let stick = host.plug(UsbDevice::stick("stick1").port("1"))?;
        guest.check_content(&stick)?;
        let (name, serial) = (host.kernel_name(&stick)?, stick.device.serial_number());
        let in_guest = directory_of(guest.remote(), "serial", serial)?;
        let interface = format!("{}:1.0", in_guest.rsplit('/').next().context("a path")?);
        let driver = "/sys/bus/usb/drivers/usb-storage";
        guest.run(&format!("echo {interface} > {driver}/unbind"))?;
        sleep(guest.remote(), &in_guest)?;
        let in_host = format!("/sys/bus/usb/devices/{name}");
        sleep(host.remote(), &in_host)?;
        progress("the stick is suspended in the guest and in the host");
        guest.run(&format!("echo {interface} > {driver}/bind"))?;
        guest.check_content(&stick)?;
        host.run(&format!("grep -qx active {in_host}/power/runtime_status")).context("it is awake again")?;
        Ok(())
    })
}

/// The directory in sysfs of the device with this attribute.
fn directory_of(machine: &Remote, attribute: &str, value: &str) -> Result<String> {
    machine.run(&format!("dirname $(grep -lx {value} /sys/bus/usb/devices/*/{attribute})"))
}

/// Lets a kernel suspend a device, and waits until it has.
fn sleep(machine: &Remote, directory: &str) -> Result<()> {
    machine.run(&format!(
        "echo 100 > {directory}/power/autosuspend_delay_ms && echo auto > {directory}/power/control"
    ))?;
    let script =
        format!("until grep -qx suspended {directory}/power/runtime_status; do busybox usleep 50000; done");
    machine.run_within(&script, ASLEEP_WITHIN).map(drop).with_context(|| format!("{directory} stays awake"))
}
