//! usbpolicyd killed, and devices pulled, at each step of a hand-over, while a guest works with another device of the
//! same controller; and a whole hub on its way into a guest.

use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use vm_tests::injection::{Injection, Step};
use vm_tests::play::{SHORT, wait_driver, wait_until};
use vm_tests::scenarios::Client;
use vm_tests::{
    Guest, Host, HostConfig, Log, Mark, Plugged, Process, UsbDevice, Usbpolicyd, Usbvfiod, progress, scenario,
};

/// A stick in socket 1 that the guest reads all the time, and a hub in socket 4 with all below it.
const POLICY: &str = r#"
schema = 1
[vms.vm1]
[connectors.bench]
at = "pci-0000:00:10.0/usb2:4"
subtree = true
[[assign]]
name = "steady"
vm = "vm1"
match = { at = "pci-0000:00:10.0/usb3:1" }
[[assign]]
name = "bench"
vm = "vm1"
match = { at = "bench" }
"#;

/// A tablet in socket 2 that comes and goes.
const TABLET: &str = r#"
[[assign]]
name = "tablet"
vm = "vm1"
match = { at = "pci-0000:00:10.0/usb2:2" }
"#;

/// Its name in the kernel of the host.
const TABLET_NAME: &str = "1-2";

/// Where a hand-over touches the kernel, an instance or the disk. A step that is not reached ends its series.
const SERIES: [(&str, u32); 4] = [("rename", 1), ("sendmsg", 1), ("recvmsg", 1), ("ioctl", 5)];

/// Longest that a step or the end of a hand-over takes on a busy machine.
const WITHIN: Duration = Duration::from_secs(60);

fn with_tablet() -> String {
    format!("{POLICY}{TABLET}")
}

/// Reads a disk in the guest again and again, slowly, and compares it each time.
struct SteadyReader {
    process: Process,
}

impl SteadyReader {
    fn start(guest: &Guest, stick: &Plugged) -> Result<Self> {
        let disk = guest.wait_disk(stick)?;
        let script = format!(
            "rounds=0; until [ -e /stop ]; do echo 3 > /proc/sys/vm/drop_caches; \
             sum=$(dd if={disk} bs=64k iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1); \
             [ $sum = {} ] || {{ echo BAD; exit 1; }}; rounds=$((rounds+1)); usleep 300000; done; echo $rounds",
            stick.sha256()
        );
        Ok(Self { process: guest.remote().spawn(&["sh", "-c", &script])? })
    }

    /// How often it has read the whole disk, each time without a fault.
    fn finish(&self, guest: &Guest) -> Result<u32> {
        guest.run("touch /stop")?;
        let ended = self.process.wait(Duration::from_secs(120))?;
        ensure!(ended == vm_tests::Ended::Status(0), "{ended:?}: {}", self.process.log().tail(5));
        Ok(String::from_utf8_lossy(&self.process.take_stdout()).trim().parse()?)
    }
}

fn says(log: &Log, mark: Mark, what: &str) -> bool {
    !log.all_after(mark, what).is_empty()
}

/// Puts a policy in force while the daemon is to die at a step. Afterwards a new one must bring things to `end`, a line
/// of its log. Whether the step was reached.
fn killed_at(
    host: &Host,
    daemon: Usbpolicyd,
    step: Step,
    policy: &str,
    end: &str,
) -> Result<(Usbpolicyd, bool)> {
    let mark = daemon.log().here();
    let injection = Injection::new(host, "usbpolicyd", step, "KILL")?;
    daemon.reload(host, policy)?;
    let is_reached = injection.reached_before(WITHIN, || Ok(says(daemon.log(), mark, end)))?;
    injection.release()?;
    if !is_reached {
        return Ok((daemon, false));
    }
    drop(daemon);
    Ok((Usbpolicyd::start_again(host)?, true))
}

fn kill_at_each_step(host: &Host, mut daemon: Usbpolicyd) -> Result<Usbpolicyd> {
    let (attached, released) =
        (format!("attached {TABLET_NAME} "), format!("released {TABLET_NAME} *back with the host"));
    let mut deaths = 0;
    for (call, most) in SERIES {
        for number in 1..=most {
            let step = Step { call, number };
            let (next, is_given) = killed_at(host, daemon, step, &with_tablet(), &attached)?;
            wait_until(host, &format!("usbpolicyctl list | grep -q '^{TABLET_NAME} .*with vm1'"))?;
            let (next, is_taken) = killed_at(host, next, step, POLICY, &released)?;
            wait_driver(host, TABLET_NAME, "usbhid")?;
            daemon = next;
            deaths += u32::from(is_given) + u32::from(is_taken);
            progress(&format!("{step:?}: attach reached {is_given}, detach reached {is_taken}"));
            if !is_given && !is_taken {
                break;
            }
        }
    }
    ensure!(deaths >= 8, "usbpolicyd died only {deaths} times: the steps are not those of a hand-over");
    progress(&format!("usbpolicyd died {deaths} times"));
    Ok(daemon)
}

/// Pulls the tablet while usbpolicyd stands still at a step of its hand-over.
fn pull_at_each_step(host: &Host, daemon: &Usbpolicyd, tablet: &Plugged) -> Result<()> {
    let steps = [("ioctl", 1), ("ioctl", 3), ("ioctl", 4), ("ioctl", 5), ("rename", 1), ("sendmsg", 1)];
    let mut pulls = 0;
    for (call, number) in steps {
        let mark = daemon.log().here();
        let injection = Injection::new(host, "usbpolicyd", Step { call, number }, "STOP")?;
        host.replug(tablet)?;
        let attached = format!("attached {TABLET_NAME} ");
        let is_reached = injection.reached_before(WITHIN, || Ok(says(daemon.log(), mark, &attached)))?;
        host.unplug(tablet)?;
        daemon.process().signal(Signal::SIGCONT)?;
        injection.release()?;
        daemon.log().wait_after(mark, &format!("unplugged {TABLET_NAME} "), WITHIN)?;
        pulls += u32::from(is_reached);
        progress(&format!("pulled at {call} {number}: reached {is_reached}"));
    }
    ensure!(pulls >= 4, "only {pulls} of the steps were reached");
    Ok(())
}

#[test]
fn killed_and_pulled_at_each_step_while_a_guest_works() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let steady = host.plug(UsbDevice::stick("steady").port("1").size_mib(2))?;
        let mut daemon = Usbpolicyd::start(host, POLICY)?;
        let controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &Client::Qemu.guest("vm1"))?;
        let reader = SteadyReader::start(&guest, &steady)?;
        let since = guest.here();

        progress("a hub with a keyboard and a stick, pulled and plugged again");
        let hub = host.plug(UsbDevice::hub("hub").port("4"))?;
        for (keys, disk) in [("keys", "low"), ("keys2", "low2")] {
            let mark = guest.here();
            wait_until(host, "[ -e /sys/bus/usb/devices/1-4:1.0/1-4-port1 ]")?;
            host.plug(UsbDevice::keyboard(keys).port("4.1"))?;
            let low = host.plug(UsbDevice::stick(disk).port("4.2").size_mib(1))?;
            guest.wait_line_after(mark, "input: *Keyboard as /", WITHIN)?;
            guest.check_content(&low)?;
            ensure!(!guest.has_id("0409:55aa")?, "the hub itself was handed over");
            host.unplug(&hub)?;
            let first = guest.wait_line_after(mark, "USB disconnect", WITHIN)?;
            guest.wait_line_after(first.mark, "USB disconnect", WITHIN)?;
            host.replug(&hub)?;
        }

        progress("usbpolicyd is killed at each step of attach and detach");
        let tablet = host.plug(UsbDevice::tablet("tablet").port("2"))?;
        host.kernel_name(&tablet)?;
        daemon = kill_at_each_step(host, daemon)?;

        progress("the tablet is pulled at each step of its hand-over");
        let mark = daemon.log().here();
        host.unplug(&tablet)?;
        daemon.log().wait_after(mark, &format!("unplugged {TABLET_NAME} "), WITHIN)?;
        daemon.reload(host, &with_tablet())?;
        daemon.log().wait_after(mark, "policy-loaded", WITHIN)?;
        pull_at_each_step(host, &daemon, &tablet)?;

        progress("and while usbvfiod stands still with the file on its way");
        let mark = daemon.log().here();
        controller.process().signal(Signal::SIGSTOP)?;
        host.replug(&tablet)?;
        // Sent and not taken; a slow machine may see usbpolicyd give up on it already.
        let sent = "going to vm1\\|leaving vm1\\|STUCK";
        wait_until(host, &format!("usbpolicyctl list | grep -q '^{TABLET_NAME} .*\\({sent}\\)'"))?;
        host.unplug(&tablet)?;
        controller.process().signal(Signal::SIGCONT)?;
        daemon.log().wait_after(mark, &format!("unplugged {TABLET_NAME} "), WITHIN)?;

        let mark = guest.here();
        host.replug(&tablet)?;
        guest.wait_line_after(mark, "input: *Tablet as /", SHORT)?;
        let rounds = reader.finish(&guest)?;
        progress(&format!("meanwhile the guest read its stick {rounds} times without a fault"));
        ensure!(rounds >= 5, "the guest read its stick only {rounds} times");
        let resets = guest.kernel_log().all_after(since, "reset SuperSpeed");
        ensure!(resets.is_empty(), "the guest had trouble with its stick: {resets:?}");
        Ok(())
    })
}
