//! `usbpolicyd` on a real kernel, with a process that only plays `usbvfiod`: what it hands over, takes back and survives.

use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use vm_tests::{Host, HostConfig, Process, UsbDevice, scenario};

const SHORT: Duration = Duration::from_secs(10);
const POLICY: &str = "/root/policy.toml";

/// Two VMs; `work` gets what is in socket 1, `lab` what is in socket 2.
const TWO_VMS: &str = r#"
schema = 1
[vms.work]
[vms.lab]
[[assign]]
name = "socket-1"
vm = "work"
match = { at = "pci-0000:00:10.0/usb2:1" }
[[assign]]
name = "socket-2"
vm = "lab"
match = { at = "pci-0000:00:10.0/usb2:2" }
"#;

fn daemon(host: &Host, policy: &str) -> Result<Process> {
    host.remote().write_file(POLICY, policy.as_bytes())?;
    let daemon = host.spawn(&["usbpolicyd", "--policy", POLICY, "--log", "debug", "--no-sandbox"])?;
    daemon.log().wait("*policy-loaded*", SHORT)?;
    Ok(daemon)
}

fn instance(host: &Host, vm: &str) -> Result<Process> {
    let instance = host.spawn(&["play-instance", &format!("/run/usbvfiod/{vm}")])?;
    instance.log().wait("listening", SHORT)?;
    Ok(instance)
}

fn driver(host: &Host, name: &str) -> Result<String> {
    host.run(&format!("basename $(readlink /sys/bus/usb/devices/{name}:1.0/driver || echo none)"))
}

/// Waits until a shell condition holds in the host.
fn wait_until(host: &Host, condition: &str) -> Result<()> {
    let script = format!(
        "for i in $(seq 100); do if {condition}; then exit 0; fi; busybox usleep 100000; done; exit 1"
    );
    host.run(&script).with_context(|| format!("waited for {condition}"))?;
    Ok(())
}

#[test]
fn devices_go_to_their_vms_by_socket_and_come_back() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let daemon = daemon(host, TWO_VMS)?;
        let work = instance(host, "work")?;
        let lab = instance(host, "lab")?;
        daemon.log().wait("*usbvfiod is up*vm=work*", SHORT)?;

        let first = host.plug(UsbDevice::stick("one").port("1"))?;
        let second = host.plug(UsbDevice::stick("two").port("2"))?;
        let third = host.plug(UsbDevice::stick("three").port("3"))?;
        work.log().wait("holding *", SHORT)?;
        lab.log().wait("holding *", SHORT)?;
        let (one, two, three) =
            (host.kernel_name(&first)?, host.kernel_name(&second)?, host.kernel_name(&third)?);
        assert_eq!(driver(host, &one)?, "usbfs");
        assert_eq!(driver(host, &two)?, "usbfs");
        assert_eq!(driver(host, &three)?, "usb-storage");
        println!("{}", host.run("usbpolicyctl list --long; usbpolicyctl vm list; usbpolicyctl log")?);

        // Pulled while nobody uses it.
        let mark = work.log().here();
        host.unplug(&first)?;
        work.log().wait_after(mark, "gone *", SHORT)?;
        let mark = work.log().here();
        host.replug(&first)?;
        work.log().wait_after(mark, "holding *", SHORT)?;

        // The VM goes: the host has its stick again.
        lab.stop(Signal::SIGKILL, SHORT)?;
        wait_until(host, &format!("readlink /sys/bus/usb/devices/{two}:1.0/driver | grep -q usb-storage"))?;
        let list = host.run("usbpolicyctl list --json")?;
        assert!(list.contains("vm-down"), "{list}");

        // And comes back.
        let lab = instance(host, "lab")?;
        lab.log().wait("holding *", SHORT)?;
        Ok(())
    })
}

#[test]
fn killed_daemon_finds_everything_as_it_was() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let first = daemon(host, TWO_VMS)?;
        let work = instance(host, "work")?;
        host.plug(UsbDevice::stick("one").port("1"))?;
        work.log().wait("holding *", SHORT)?;
        first.log().wait("*attached*", SHORT)?;
        first.stop(Signal::SIGKILL, SHORT)?;

        let mark = work.log().here();
        let second = daemon(host, TWO_VMS)?;
        second.log().wait("*adopted*vm work*", SHORT)?;
        assert!(work.log().all_after(mark, "detach *").is_empty());
        assert!(work.log().all_after(mark, "attach *").is_empty());
        Ok(())
    })
}

#[test]
fn reload_moves_only_what_changed_and_a_bad_file_changes_nothing() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let daemon = daemon(host, TWO_VMS)?;
        let work = instance(host, "work")?;
        let lab = instance(host, "lab")?;
        let start = work.log().here();
        host.plug(UsbDevice::stick("one").port("1"))?;
        host.plug(UsbDevice::stick("two").port("2"))?;
        work.log().wait("holding *", SHORT)?;
        lab.log().wait("holding *", SHORT)?;

        host.remote().write_file(POLICY, b"schema = 1\n[vms.work]\n[[assign]]\nvm = \"wrok\"\n")?;
        let refused = host.remote().try_run("usbpolicyctl reload", SHORT)?;
        assert_eq!(refused.status, 1, "{}", refused.transcript);
        println!("{}", refused.transcript);
        let mark = lab.log().here();
        let without_lab = TWO_VMS.replace("usb2:2", "usb2:4");
        host.remote().write_file(POLICY, without_lab.as_bytes())?;
        daemon.signal(Signal::SIGHUP)?;
        lab.log().wait_after(mark, "detach *", SHORT)?;
        assert!(work.log().all_after(start, "detach *").is_empty());
        Ok(())
    })
}
