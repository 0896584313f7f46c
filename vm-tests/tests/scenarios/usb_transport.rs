//! usbvfiod's transport alone, on devices of a real kernel (`bin/usb-transport.rs`).

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use vm_tests::{Ended, Host, HostConfig, Plugged, UsbDevice, scenario};

/// One check takes seconds, emulation included.
const CHECK_WITHIN: Duration = Duration::from_secs(120);

fn check(host: &Host, what: &str, device: &Plugged) -> Result<String> {
    let name = host.kernel_name(device)?;
    vm_tests::progress(&format!("{what} on {name}"));
    let process = host.spawn(&["usb-transport", what, &name])?;
    let ended = process.wait(CHECK_WITHIN)?;
    let said = process.log().tail(40);
    ensure!(ended == Ended::Status(0), "{what}: {ended:?}\n{said}");
    Ok(said)
}

/// SHA-256 of the first bytes of a medium, in hex.
fn sha256_of_start(device: &Plugged, len: usize) -> Result<String> {
    let medium = device.medium.as_ref().context("a stick has a medium")?;
    let bytes = std::fs::read(&medium.path)?;
    Ok(vm_tests::devices::hex(&Sha256::digest(&bytes[..len])))
}

#[test]
fn transport_serves_a_superspeed_stick_and_a_keyboard() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let stick = host.plug(UsbDevice::stick("stick1").port("1"))?;
        let keyboard = host.plug(UsbDevice::keyboard("keyboard1").port("2"))?;
        for what in ["claims", "refusals", "control", "short-in", "stall", "operations"] {
            println!("{}", check(host, what, &stick)?);
        }
        println!("{}", check(host, "cancel", &keyboard)?);
        let said = check(host, "whole-medium", &stick)?;
        println!("{said}");
        assert!(said.contains(&format!("sha256 {}", stick.sha256())), "{said}");

        host.run("echo 1 > /sys/module/usbcore/parameters/usbfs_memory_mb")?;
        let said = check(host, "no-memory", &stick)?;
        println!("{said}");
        assert!(said.contains(&sha256_of_start(&stick, 8 << 20)?), "{said}");
        host.run("echo 16 > /sys/module/usbcore/parameters/usbfs_memory_mb")?;

        let name = host.kernel_name(&stick)?;
        let process = host.spawn(&["usb-transport", "unplug", &name])?;
        process.log().wait("reading", CHECK_WITHIN)?;
        host.unplug(&stick)?;
        let ended = process.wait(CHECK_WITHIN)?;
        assert_eq!(ended, Ended::Status(0), "{}", process.log().tail(40));
        println!("{}", process.log().tail(40));
        Ok(())
    })
}

#[test]
fn transport_serves_devices_that_follow_a_script() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        host.run("modprobe vhci_hcd")?;
        let mut failed = Vec::new();
        for what in [
            "bulk",
            "faults",
            "lies",
            "identity",
            "isochronous",
            "silent-operation",
            "neighbours",
            "uas-hidden",
        ] {
            vm_tests::progress(what);
            let process = host.spawn(&["usb-transport", "scripted", what])?;
            let ended = process.wait(CHECK_WITHIN)?;
            let said = process.log().tail(40);
            println!("{said}");
            if ended != Ended::Status(0) {
                failed.push(format!("{what}: {ended:?}\n{said}"));
            }
        }
        ensure!(failed.is_empty(), "{failed:#?}");
        Ok(())
    })
}

#[test]
fn transport_serves_streams() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let disk = host.plug(UsbDevice::uas("disk1").port("3"))?;
        println!("{}", check(host, "streams", &disk)?);
        Ok(())
    })
}

/// Not part of the usual run: `VM_TESTS_PROFILE=release cargo test -p vm-tests usb_transport -- --ignored`.
#[test]
#[ignore = "a measurement, minutes long and of use on an idle machine only"]
fn transport_costs_little_more_than_a_bare_loop() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let stick = host.plug(UsbDevice::stick("stick1").port("1"))?;
        let name = host.kernel_name(&stick)?;
        let process = host.spawn(&["usb-transport", "bench", &name])?;
        let ended = process.wait(Duration::from_secs(500))?;
        println!("{}", process.log().tail(20));
        ensure!(ended == Ended::Status(0), "{ended:?}");
        Ok(())
    })
}
