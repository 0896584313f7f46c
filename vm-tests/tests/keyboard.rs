//! A keyboard: interrupt transfers that wait for a person.

use std::time::Duration;

use anyhow::Result;
use vm_tests::scenarios::Client;
use vm_tests::{Guest, HostConfig, UsbDevice, Usbpolicyd, Usbvfiod, on_each_client, scenario};

const POLICY: &str = r#"
schema = 1
[vms.vm1]
[[assign]]
vm = "vm1"
match = { id = "0627:0001" }
"#;

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
        Ok(())
    })
}
