//! A stick on its way into a guest and out of it again.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vm_tests::scenarios::Client;
use vm_tests::{
    Guest, Host, HostConfig, UsbDevice, Usbpolicyd, Usbvfiod, on_each_client, progress, scenario,
};

/// All sticks go to vm1.
const POLICY: &str = r#"
schema = 1
[vms.vm1]
[[assign]]
vm = "vm1"
match = { id = "46f4:0001" }
"#;

/// From the pull until the guest knows; milliseconds where nothing is emulated.
const NOTICED_WITHIN: Duration = Duration::from_secs(20);

on_each_client!(present_at_guest_boot, plugged_pulled_and_plugged_again, pulled_during_a_copy, guest_reboots);

fn present_at_guest_boot(client: Client) -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let stick = host.plug(UsbDevice::stick("stick1"))?;
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &client.guest("vm1"))?;
        guest.check_content(&stick)?;
        write_and_read_back(&guest, &guest.wait_disk(&stick)?)?;
        guest.stop()?;
        controller.stop()
    })
}

fn plugged_pulled_and_plugged_again(client: Client) -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let _controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &client.guest("vm1"))?;

        let stick = host.plug(UsbDevice::stick("stick1"))?;
        guest.check_content(&stick)?;

        // Nobody in the guest touches it: the guest has to be told.
        pull_and_see(host, &guest, &stick)?;
        guest.wait_path("!/dev/sda", Duration::from_secs(60))?;

        host.replug(&stick)?;
        guest.check_content(&stick)
    })
}

fn pulled_during_a_copy(client: Client) -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let _controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &client.guest("vm1"))?;
        let stick = host.plug(UsbDevice::stick("stick1").size_mib(32))?;
        let disk = guest.wait_disk(&stick)?;

        let copy = guest.start_copy(&disk, 1000)?;
        guest.wait_read_from(&disk, 4 << 20)?;
        pull_and_see(host, &guest, &stick)?;
        let outcome = copy.finish(Duration::from_secs(120));
        ensure!(outcome.is_err(), "a copy from a stick that was pulled succeeded: {outcome:?}");

        host.replug(&stick)?;
        guest.check_content(&stick)
    })
}

fn guest_reboots(client: Client) -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &client.guest("vm1"))?;
        let stick = host.plug(UsbDevice::stick("stick1"))?;
        guest.check_content(&stick)?;
        for _ in 0..2 {
            guest.reboot()?;
            guest.check_content(&stick)?;
        }
        ensure!(controller.process().is_running(), "usbvfiod did not outlive the reboots");
        Ok(())
    })
}

/// Pulls a stick and waits until the guest's kernel says so by itself.
fn pull_and_see(host: &Host, guest: &Guest, stick: &vm_tests::Plugged) -> Result<()> {
    let before = guest.here();
    let pulled = Instant::now();
    host.unplug(stick)?;
    let line = guest.wait_line_after(before, "USB disconnect", NOTICED_WITHIN)?;
    progress(&format!("the guest noticed {:?} after the pull", line.at.duration_since(pulled)));
    Ok(())
}

/// Four MiB of random bytes written to the stick and read again past the guest's cache.
fn write_and_read_back(guest: &Guest, disk: &str) -> Result<()> {
    guest.run_within(
        &format!(
            "set -e; dd if=/dev/urandom of=/random bs=64k count=64 2>/dev/null; \
             dd if=/random of={disk} bs=64k seek=16 conv=fsync 2>/dev/null; \
             echo 3 > /proc/sys/vm/drop_caches; \
             back=$(dd if={disk} bs=64k skip=16 count=64 2>/dev/null | sha256sum); \
             [ \"$(sha256sum < /random)\" = \"$back\" ]; rm /random"
        ),
        Duration::from_secs(180),
    )?;
    progress("the guest wrote to the stick and read it back");
    Ok(())
}
