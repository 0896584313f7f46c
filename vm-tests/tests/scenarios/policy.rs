//! `usbpolicyd` on a real kernel, as its own user without any capability, with processes that only play `usbvfiod`: what
//! it hands over, keeps, takes back and survives. Whole ways into a guest are in `stick.rs` and `assignment.rs`.

use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use vm_tests::play::{SHORT, instance, wait_driver, wait_until};
use vm_tests::{HostConfig, Mark, UsbDevice, Usbpolicyd, scenario};

/// `work` gets what is in socket 1, `lab` what is in socket 2 and everything on a hub in socket 4. Ports are not claimed.
const FREE_PORTS: &str = r#"
schema = 1
[defaults]
claim_ports = false
[vms.work]
[vms.lab]
[connectors.bench]
at = "pci-0000:00:10.0/usb2:4"
subtree = true
[[assign]]
name = "socket-1"
vm = "work"
match = { at = "pci-0000:00:10.0/usb2:1" }
[[assign]]
name = "socket-2"
vm = "lab"
match = { at = "pci-0000:00:10.0/usb2:2" }
[[assign]]
name = "bench"
vm = "lab"
match = { at = "bench" }
"#;

/// The same with the ports kept from the host's drivers.
fn claimed_ports() -> String {
    FREE_PORTS.replace("claim_ports = false", "claim_ports = true")
}

#[test]
fn devices_go_to_their_vms_by_socket_and_come_back() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let daemon = Usbpolicyd::start(host, FREE_PORTS)?;
        let (work, lab) = (instance(host, "work", &[])?, instance(host, "lab", &[])?);

        let first = host.plug(UsbDevice::stick("one").port("1"))?;
        let second = host.plug(UsbDevice::stick("two").port("2"))?;
        let third = host.plug(UsbDevice::stick("three").port("3"))?;
        work.log().wait("holding *", SHORT)?;
        lab.log().wait("holding *", SHORT)?;
        let (one, two, three) =
            (host.kernel_name(&first)?, host.kernel_name(&second)?, host.kernel_name(&third)?);
        wait_driver(host, &one, "usbfs")?;
        wait_driver(host, &two, "usbfs")?;
        wait_driver(host, &three, "usb-storage")?;
        println!("{}", host.run("usbpolicyctl list --long; usbpolicyctl vm list; usbpolicyctl log")?);

        // Pulled while nobody uses it, and plugged again.
        let mark = work.log().here();
        host.unplug(&first)?;
        work.log().wait_after(mark, "gone *", SHORT)?;
        host.replug(&first)?;
        work.log().wait_after(mark, "holding *", SHORT)?;

        // The daemon is killed again and again while all is in use: nobody notices.
        let mark = work.log().here();
        daemon.kill()?;
        for milliseconds in [0, 3, 10, 30, 60, 100, 200, 400] {
            let short = format!(
                "rm -f /run/usbpolicyd/admin.sock; setpriv --reuid usbpolicyd --regid usbpolicyd --clear-groups \
                 usbpolicyd & busybox usleep {milliseconds}000; kill -9 $!; wait $!; true"
            );
            host.run(&short)?;
        }
        let daemon = Usbpolicyd::start_again(host)?;
        daemon.log().wait("*adopted*vm work*", SHORT)?;
        for word in ["detach *", "attach *", "gone *"] {
            ensure!(work.log().all_after(mark, word).is_empty(), "a restart led to {word}");
        }

        // A bad policy is refused, and one that changes one rule moves one device.
        let mark = lab.log().here();
        host.remote().write_file("/etc/usbpolicyd/policy.toml", b"schema = 1\n[vms.work]\nx = 1\n")?;
        let refused = host.remote().try_run("usbpolicyctl reload", SHORT)?;
        ensure!(
            refused.status == 1 && refused.transcript.contains("old policy stays"),
            "{}",
            refused.transcript
        );
        daemon.reload(host, &FREE_PORTS.replace("usb2:2\"", "usb2:7\""))?;
        lab.log().wait_after(mark, "detach *", SHORT)?;
        wait_driver(host, &two, "usb-storage")?;
        wait_driver(host, &one, "usbfs")?;

        // The VM goes: the host has its stick again.
        work.stop(Signal::SIGKILL, SHORT)?;
        wait_driver(host, &one, "usb-storage")?;
        ensure!(host.run("usbpolicyctl list --json")?.contains("vm-down"));
        Ok(())
    })
}

#[test]
fn kernels_command_line_stops_all_hand_overs() -> Result<()> {
    let observe = "usbpolicyd.mode=observe".to_owned();
    scenario(&HostConfig { kernel_arguments: observe, ..HostConfig::default() }, |host| {
        let daemon = Usbpolicyd::start(host, &claimed_ports())?;
        daemon.log().wait("*usbpolicyd.mode is on the kernel command line*", SHORT)?;
        let work = instance(host, "work", &[])?;
        let stick = host.plug(UsbDevice::stick("one").port("1"))?;
        let name = host.kernel_name(&stick)?;
        daemon.log().wait("*socket-1*", SHORT)?;
        wait_driver(host, &name, "usb-storage")?;
        let list = host.run("usbpolicyctl list | tr -s ' \\n' ' '")?;
        ensure!(list.contains("for work by socket-1; stays here by usbpolicyd.mode=observe"), "{list}");

        for order in [format!("attach {name} work"), format!("revoke {name}"), "vm drain work".to_owned()] {
            let refused = host.remote().try_run(&format!("usbpolicyctl {order}"), SHORT)?;
            let text = &refused.transcript;
            ensure!(refused.status == 1 && text.contains("usbpolicyd.mode=observe is on"), "{order}: {text}");
        }
        let doctor = host.remote().try_run("usbpolicyctl doctor", SHORT)?;
        ensure!(doctor.transcript.contains("usbpolicyd.mode=observe"), "{}", doctor.transcript);

        // Enough for any of it to have happened.
        host.run("udevadm settle; sleep 1; usbpolicyctl list")?;
        wait_driver(host, &name, "usb-storage")?;
        ensure!(work.log().all_after(Mark::START, "attach *").is_empty(), "a device was handed over");
        let claimed = host.run("usbpolicyctl status --json")?;
        ensure!(!claimed.contains("-port"), "ports are claimed: {claimed}");
        Ok(())
    })
}

#[test]
fn claimed_ports_are_kept_from_the_hosts_drivers_and_hubs_below_work() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let daemon = Usbpolicyd::start(host, &claimed_ports())?;
        daemon.log().wait("*ports kept*usb1-port1*usb2-port1*", SHORT)?;
        let stick = host.plug(UsbDevice::stick("one").port("1"))?;
        let name = host.kernel_name(&stick)?;
        // Its VM is down, and still no driver of the host has seen it.
        wait_until(host, &format!("usbpolicyctl list | grep -q '{name} .*for work'"))?;
        host.run("udevadm settle")?;
        ensure!(host.run(&format!("cat /sys/bus/usb/devices/{name}/bConfigurationValue"))?.is_empty());

        let work = instance(host, "work", &[])?;
        work.log().wait("holding *", SHORT)?;
        work.stop(Signal::SIGKILL, SHORT)?;
        wait_until(host, &format!("usbpolicyctl list | grep -q '{name} .*for work'"))?;
        wait_driver(host, &name, "none")?;

        // A whole hub: everything below it goes to the VM, the hub never.
        let lab = instance(host, "lab", &[])?;
        let hub = host.plug(UsbDevice::hub("hub").port("4"))?;
        wait_until(host, "[ -e /sys/bus/usb/devices/1-4:1.0/1-4-port1 ]")?;
        daemon.log().wait("*ports kept*1-4-port1*", SHORT)?;
        host.plug(UsbDevice::keyboard("below").port("4.2"))?;
        let line = lab.log().wait("attach * 4.2 *", SHORT)?;
        lab.log().wait("holding *", SHORT)?;
        ensure!(!lab.log().tail(50).contains(" 4 0409:55aa"), "the hub itself was handed over");
        let mark = lab.log().here();
        host.unplug(&hub)?;
        lab.log().wait_after(mark, "gone *", SHORT)?;
        host.replug(&hub)?;
        host.plug(UsbDevice::keyboard("again").port("4.3"))?;
        lab.log().wait_after(mark, "attach * 4.3 *", SHORT)?;
        println!("{line:?}\n{}", host.run("usbpolicyctl list --tree; usbpolicyctl status")?);

        // Without the rule the host gets its stick.
        daemon.reload(host, &claimed_ports().replace("usb2:1\"", "usb2:7\""))?;
        wait_driver(host, &name, "usb-storage")
    })
}

#[test]
fn what_the_host_needs_stays_until_it_is_free_and_orders_go_over_rules() -> Result<()> {
    const BY_ID: &str = "schema = 1\n[vms.work]\n[vms.lab]\n[[assign]]\nname = \"sticks\"\nvm = \"work\"\n\
                         match = { id = \"46f4:0001\" }\n";
    scenario(&HostConfig::default(), |host| {
        let stick = host.plug(UsbDevice::stick("one").port("3"))?;
        let name = host.kernel_name(&stick)?;
        wait_until(host, "[ -b /dev/sda ]")?;
        host.run("mkfs.ext4 -q /dev/sda && mkdir -p /srv/data && mount /dev/sda /srv/data")?;
        let _daemon = Usbpolicyd::start(host, BY_ID)?;
        let work = instance(host, "work", &[])?;
        wait_until(host, &format!("usbpolicyctl list | grep -q '{name} .*protected'"))?;
        println!("{}", host.run("usbpolicyctl list --long")?);
        // Nobody may order it away either.
        let refused = host.remote().try_run(&format!("usbpolicyctl attach {name} work"), SHORT)?;
        ensure!(
            refused.status == 1 && refused.transcript.contains("mounted on /srv/data"),
            "{}",
            refused.transcript
        );
        host.run("umount /srv/data")?;
        work.log().wait("holding *", SHORT)?;

        // Orders: off the VM, to another VM, back to the rules.
        let lab = instance(host, "lab", &[])?;
        host.run(&format!("usbpolicyctl detach {name}"))?;
        wait_driver(host, &name, "usb-storage")?;
        host.run(&format!("usbpolicyctl attach {name} lab"))?;
        lab.log().wait("holding *", SHORT)?;
        let mark = work.log().here();
        println!("{}", host.run("usbpolicyctl orders; usbpolicyctl list")?);
        host.run(&format!("usbpolicyctl clear {name}"))?;
        work.log().wait_after(mark, "holding *", SHORT)?;

        // Paused, drained, resumed.
        host.run("usbpolicyctl vm drain work")?;
        work.log().wait_after(mark, "detach *", SHORT)?;
        let mark = work.log().here();
        host.run("usbpolicyctl vm resume work")?;
        work.log().wait_after(mark, "holding *", SHORT)?;

        // Plug something in and get its rule; see what is to be done on this host; look without the daemon.
        let watch = host.spawn(&["usbpolicyctl", "watch", "--json"])?;
        let learn = host.spawn(&["usbpolicyctl", "learn", "--vm", "work"])?;
        learn.log().wait("plug the device in now*", SHORT)?;
        host.plug(UsbDevice::keyboard("keys").port("5"))?;
        learn.log().wait("vm = \"work\"", SHORT)?;
        watch.log().wait("*\"event\":\"plugged\"*\"ids\":\"0627:0001\"*", SHORT)?;
        // A snapshot for a bug report: good for trying the policy elsewhere, and without serial numbers.
        let serial = host.run(&format!("cat /sys/bus/usb/devices/{name}/serial"))?;
        let tried = host.run(&format!(
            "usbpolicyctl snapshot --redact > /tmp/snapshot.json && cat /tmp/snapshot.json && \
             usbpolicyctl explain {name} --devices /tmp/snapshot.json --no-daemon"
        ))?;
        ensure!(tried.contains("serial-1") && !tried.contains(&serial), "{tried}");
        ensure!(tried.contains("sticks"), "{tried}");
        let doctor = host.remote().try_run("usbpolicyctl doctor", SHORT)?;
        println!("{}", doctor.transcript);
        ensure!(doctor.status == 1 && doctor.transcript.contains("usbfs_memory_mb"), "{}", doctor.transcript);
        let alone = host.run("usbpolicyctl list --no-daemon")?;
        ensure!(alone.contains(&format!("{name} ")) && alone.contains("for work by sticks"), "{alone}");

        // Another user may not even look, and is told what is missing.
        let stranger = host
            .remote()
            .try_run("setpriv --reuid 4242 --regid 4242 --clear-groups usbpolicyctl list", SHORT)?;
        ensure!(
            stranger.status == 1 && stranger.transcript.contains("usbpolicy-view"),
            "{}",
            stranger.transcript
        );
        Ok(())
    })
}

#[test]
fn instances_that_refuse_or_fall_silent_hold_nobody_up() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let daemon = Usbpolicyd::start(host, FREE_PORTS)?;
        let (work, lab) = (instance(host, "work", &["silent"])?, instance(host, "lab", &["refuse"])?);
        host.plug(UsbDevice::stick("one").port("1"))?;
        host.plug(UsbDevice::stick("two").port("2"))?;
        lab.log().wait("refused *", SHORT)?;
        wait_until(host, "usbpolicyctl list | grep -q 'FAILED for lab'")?;
        work.log().wait("attach *", SHORT)?;
        wait_until(host, "usbpolicyctl list | grep -q STUCK")?;
        ensure!(host.remote().try_run("usbpolicyctl list", SHORT)?.status == 1, "trouble has its own status");
        // The refusal is tried again, later and later.
        let mark = lab.log().here();
        lab.log().wait_after(mark, "refused *", SHORT)?;
        let from = lab.log().here();
        // The silent one goes: its device is free for the next one.
        work.stop(Signal::SIGKILL, SHORT)?;
        let work = instance(host, "work", &[])?;
        work.log().wait("holding *", SHORT)?;

        // Events that the daemon sleeps through are lost; it notices, reads everything once, and all is right.
        let mark = daemon.log().here();
        daemon.process().signal(Signal::SIGSTOP)?;
        let storm =
            "for i in $(seq 400); do echo change > /sys/bus/usb/devices/usb1/uevent; done; udevadm settle";
        host.remote().run_within(storm, Duration::from_secs(200))?;
        let third = host.plug(UsbDevice::stick("three").port("4"))?;
        let name = host.kernel_name(&third)?;
        host.run("udevadm settle")?;
        daemon.process().signal(Signal::SIGCONT)?;
        daemon.log().wait_after(mark, "*overrun*", SHORT)?;
        lab.log().wait_after(from, "attach * 4 *", SHORT)?;
        wait_until(host, &format!("usbpolicyctl list | grep -q '{name} .*FAILED for lab'"))?;
        ensure!(daemon.log().all_after(mark, "*overrun*").len() <= 2, "one overrun is said once");
        Ok(())
    })
}
