//! USB 1.1, 2 and 3 controllers of the host, one guest.

use anyhow::Result;
use vm_tests::scenarios::Client;
use vm_tests::{Controller, Guest, HostConfig, UsbDevice, Usbpolicyd, Usbvfiod, scenario};

const POLICY: &str = r#"
schema = 1
[vms.vm1]
[[assign]]
vm = "vm1"
match = { id = "46f4:0001" }
"#;

#[test]
fn sticks_behind_usb_1_2_and_3_controllers_are_whole_and_show_their_speed() -> Result<()> {
    let kinds = [
        (Controller::Uhci, "full", 1, "12"),
        (Controller::Ehci, "high", 8, "480"),
        (Controller::Xhci, "super", 16, "5000"),
    ];
    scenario(&HostConfig::with(&kinds.map(|(controller, ..)| controller)), |host| {
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let _controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &Client::Qemu.guest("vm1"))?;
        for (controller, name, mib, speed) in kinds {
            let stick = host.plug(UsbDevice::stick(name).on(controller).size_mib(mib))?;
            guest.check_content(&stick)?;
            let serial = stick.device.serial_number();
            let shown = guest
                .run(&format!("cat $(dirname $(grep -lx {serial} /sys/bus/usb/devices/*/serial))/speed"))?;
            assert_eq!(shown, speed, "{controller:?}");
        }
        Ok(())
    })
}
