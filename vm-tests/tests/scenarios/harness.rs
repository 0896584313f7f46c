//! The harness itself: what all scenarios stand on.

use std::time::Duration;

use anyhow::{Context, Result};
use vm_tests::{Guest, GuestConfig, HostConfig, Mark, UsbDevice, Vmm, scenario};

/// A stick goes the whole way with QEMU's own USB pass-through, so that a failure elsewhere is not the harness's.
#[test]
fn a_stick_reaches_a_guest_through_qemus_usb_host() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let stick = host.plug(UsbDevice::stick("stick1").port("2"))?;
        let keyboard = host.plug(UsbDevice::keyboard("keyboard1").port("3"))?;
        let place = |plugged| -> Result<String> {
            let name = host.kernel_name(plugged)?;
            Ok(name.replacen('-', ",hostport=", 1)).map(|place| format!("hostbus={place}"))
        };
        let devices = vec![place(&stick)?, place(&keyboard)?];
        let guest = Guest::start(host, &GuestConfig::new("vm1", Vmm::QemuUsbHost { devices }))?;
        guest.check_content(&stick)?;

        let keys = guest.read_keys(Mark::START, 3)?;
        host.press(&["a", "b", "ret"])?;
        let expected = [(30, 1), (30, 0), (48, 1), (48, 0), (28, 1), (28, 0)];
        assert_eq!(keys.finish(Duration::from_secs(20))?, expected);

        let disk = guest.wait_disk(&stick)?;
        let medium = stick.medium.as_ref().context("a stick has a medium")?;
        let copy = guest.start_copy(&disk, 2)?;
        assert_eq!(copy.finish(Duration::from_secs(60))?, medium.sha256_repeated(2)?);

        let copy = guest.start_copy(&disk, 1000)?;
        guest.wait_read_from(&disk, 52 << 20)?;
        let before = guest.here();
        host.unplug(&stick)?;
        guest.wait_line_after(before, "USB disconnect", Duration::from_secs(20))?;
        assert!(copy.finish(Duration::from_secs(20)).is_err(), "a copy from a stick that was pulled");
        guest.wait_gone(&stick)
    })
}

/// Cloud Hypervisor boots our guest from the same kernel; with no device from us yet.
#[test]
fn cloud_hypervisor_runs_a_guest() -> Result<()> {
    if std::env::var_os("CLOUD_HYPERVISOR").is_none() {
        eprintln!("skipped: CLOUD_HYPERVISOR names no binary");
        return Ok(());
    }
    scenario(&HostConfig::default(), |host| {
        let guest = Guest::start(host, &GuestConfig::new("vm1", Vmm::CloudHypervisorPlain))?;
        assert_eq!(guest.run("uname -s")?, "Linux");
        guest.reboot()?;
        assert_eq!(guest.run("uname -s")?, "Linux");
        Ok(())
    })
}
