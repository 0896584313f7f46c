//! The harness itself: what all scenarios stand on.

use std::time::Duration;

use anyhow::Result;
use vm_tests::{Guest, GuestConfig, HostConfig, UsbDevice, Vmm, scenario};

/// A stick goes the whole way with QEMU's own USB pass-through, so that a failure elsewhere is not the harness's.
#[test]
fn a_stick_reaches_a_guest_through_qemus_usb_host() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let stick = host.plug(UsbDevice::stick("stick1").port("2"))?;
        let name = host.kernel_name(&stick)?;
        assert!(host.run("lsusb")?.contains("46f4:0001"));

        let (bus, port) = name.split_once('-').expect("a port name");
        let device = format!("hostbus={bus},hostport={port}");
        let guest = Guest::start(host, &GuestConfig::new("vm1", Vmm::QemuUsbHost { devices: vec![device] }))?;
        guest.wait_line("sd 0:0:0:0:*Attached SCSI*disk", Duration::from_secs(30))?;
        assert_eq!(guest.sha256_of("/dev/sda", stick.size_bytes())?, stick.sha256());

        let before = guest.here();
        host.unplug(&stick)?;
        guest.wait_line_after(before, "USB disconnect", Duration::from_secs(10))?;
        Ok(())
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
