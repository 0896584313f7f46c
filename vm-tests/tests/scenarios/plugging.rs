//! Which device is which, as the kernel of the host shows it: companion ports, twins, device numbers that wrap, events that
//! are lost, devices that change, and what stands between a stick and the disk that the host works with. Without guests:
//! `play-instance` takes the files and compares the device behind each with what it was told.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use vm_tests::play::{SHORT, instance, wait_driver, wait_until};
use vm_tests::virtual_devices::{UsbIpDevice, plug_gadget, remove_gadget, wait_id};
use vm_tests::{Host, HostConfig, Log, Mark, Plugged, Process, UsbDevice, Usbpolicyd, progress, scenario};

/// Plug-ins on one bus: more than there are device numbers.
const PLUG_INS: usize = 131;

/// Events of a burst.
const BURST: usize = 3000;

/// One policy for one host: connectors, twins, gadgets.
const POLICY: &str = r#"
schema = 1
[vms.work]
[vms.lab]
[vms.wrap]
[[deny]]
name = "bad-usb"
reason = "a stick that types"
match = { interfaces.all = ["storage", "hid"] }
[[assign]]
name = "socket-3"
vm = "work"
match = { at = "pci-0000:00:10.0/usb2:3" }
[[assign]]
name = "twin-left"
vm = "work"
match = { id = "46f4:0001", serial = "LEFT" }
[[assign]]
name = "twin-right"
vm = "lab"
match = { id = "46f4:0001", serial = "RIGHT" }
[[assign]]
name = "needed"
vm = "work"
match = { id = "46f4:0001", serial = "NEEDED" }
[[assign]]
name = "gadget-stick"
vm = "work"
match = { id = "1d6b:0104" }
[[assign]]
name = "phone"
vm = "lab"
follow = "60s"
match = { id = "1d6b:0105" }
[[assign]]
name = "counted"
vm = "wrap"
match = { id = "0525:a4a0" }
"#;

/// How many lines of a log match.
fn count(log: &Log, mark: Mark, pattern: &str) -> usize {
    log.all_after(mark, pattern).len()
}

/// Waits until the list of usbpolicyctl has a line like this for a device.
fn wait_listed(host: &Host, name: &str, state: &str) -> Result<()> {
    wait_until(host, &format!("usbpolicyctl list | grep -q '^{name} .*{state}'"))
}

#[test]
fn devices_are_known_by_socket_and_serial_and_a_burst_of_events_loses_nothing() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        Usbpolicyd::start(host, POLICY)?.stop()?;
        let daemon = Usbpolicyd::start_again_with(host, &["--log", "info,usbpolicyd=debug"])?;
        let (work, lab) = (instance(host, "work", &[])?, instance(host, "lab", &[])?);

        progress("one socket, two halves: a SuperSpeed stick, then a high-speed tablet, by one rule");
        let mark = work.log().here();
        let stick = host.plug(UsbDevice::stick("fast").port("3"))?;
        work.log().wait_after(mark, "attach * 3 46f4:0001 super ", SHORT)?;
        work.log().wait_after(mark, "holding ", SHORT)?;
        ensure!(host.kernel_name(&stick)? == "2-3", "the stick is not on the SuperSpeed half");
        host.unplug(&stick)?;
        work.log().wait_after(mark, "gone ", SHORT)?;
        let tablet = host.plug(UsbDevice::tablet("slower").port("3"))?;
        work.log().wait_after(mark, "attach * 3 0627:0001 high ", SHORT)?;
        ensure!(host.kernel_name(&tablet)? == "1-3", "the tablet is not on the USB 2 half");

        progress("twins by serial number, then each in the other's socket");
        for (left_port, right_port) in [("5", "6"), ("6", "5")] {
            let (from_work, from_lab) = (work.log().here(), lab.log().here());
            let left = host.plug(UsbDevice::stick("left").port(left_port))?;
            let right = host.plug(UsbDevice::stick("right").port(right_port))?;
            work.log().wait_after(from_work, &format!("attach * {left_port} 46f4:0001 "), SHORT)?;
            lab.log().wait_after(from_lab, &format!("attach * {right_port} 46f4:0001 "), SHORT)?;
            work.log().wait_after(from_work, "holding ", SHORT)?;
            lab.log().wait_after(from_lab, "holding ", SHORT)?;
            host.unplug(&left)?;
            host.unplug(&right)?;
            work.log().wait_after(from_work, "gone ", SHORT)?;
            lab.log().wait_after(from_lab, "gone ", SHORT)?;
            ensure!(
                count(work.log(), from_work, "attach ") == 1 && count(lab.log(), from_lab, "attach ") == 1
            );
        }

        hanging(host, &daemon, &work)?;
        burst(host, &daemon, &work)
    })
}

/// A new device whose lock somebody holds, as the host's drivers often do: it is decided about when its strings can be
/// read, and keeps nobody else waiting.
fn hanging(host: &Host, daemon: &Usbpolicyd, work: &Process) -> Result<()> {
    progress("a new device that hangs, and a stick");
    let slow = || UsbIpDevice::plug(host, "identity", &["--delay-set-interface", "4900"]);
    // A hang ends after 5 s, and a busy machine may need longer for all the rest: then nothing is shown.
    for _ in 0..6 {
        let (mark, from_work) = (daemon.log().here(), work.log().here());
        // So that the device hangs before the daemon looks at it.
        daemon.process().signal(Signal::SIGSTOP)?;
        let slow = slow()?;
        let name = slow.kernel_name()?;
        let stick = host.plug(UsbDevice::stick("left").port("5"))?;
        host.kernel_name(&stick)?;
        host.run("udevadm settle")?;
        let request = host.spawn(&["usb-stream", "--id", "1209:0666", "set-interface", "0"])?;
        wait_until(host, &format!("! timeout 0.2 cat /sys/bus/usb/devices/{name}/product"))?;
        daemon.process().signal(Signal::SIGCONT)?;
        work.log().wait_after(from_work, "attach * 5 46f4:0001 ", SHORT)?;
        host.run("usbpolicyctl vm list")?;
        let is_shown = request.is_running();
        work.log().wait_after(from_work, "holding ", SHORT)?;
        daemon.log().wait_after(mark, &format!("plugged {name} "), SHORT)?;
        drop(slow);
        host.unplug(&stick)?;
        work.log().wait_after(from_work, "gone ", SHORT)?;
        daemon.log().wait_after(mark, &format!("unplugged {name} "), SHORT)?;
        if is_shown {
            return Ok(());
        }
    }
    bail!("the stick waited for the device that hangs, each time")
}

/// Events come faster than anybody reads: what the daemon does is bounded, and nothing that happens meanwhile is lost.
fn burst(host: &Host, daemon: &Usbpolicyd, work: &Process) -> Result<()> {
    progress("3000 events while the daemon runs");
    let (mark, from_work) = (daemon.log().here(), work.log().here());
    let storm = host.spawn(&["uevent-burst", &BURST.to_string(), "/sys/bus/usb/devices/usb1"])?;
    let stick = host.plug(UsbDevice::stick("left").port("5"))?;
    let told = storm.log().wait("sent * ms", SHORT)?.text;
    work.log().wait_after(from_work, "attach * 5 46f4:0001 ", SHORT)?;
    work.log().wait_after(from_work, "holding ", SHORT)?;
    // What is still in the pipe has been seen when the next thing has.
    host.unplug(&stick)?;
    work.log().wait_after(from_work, "gone ", SHORT)?;
    daemon.log().wait_after(mark, "unplugged 2-5 ", SHORT)?;
    let first = daemon.log().all_after(mark, "sysfs read*");
    let readings: Vec<_> = first
        .iter()
        .map(|line| milliseconds(line).zip(took_ms(line)).context("no times"))
        .collect::<Result<_>>()?;
    progress(&format!("{told}: sysfs was read {} times", readings.len()));
    for pair in readings.windows(2) {
        let ((ended, took), (next, _)) = (pair[0], pair[1]);
        let least = (took * 4.0).clamp(10.0, 250.0);
        ensure!(next - ended > least - 1.0, "read again after {:.1} ms: {}", next - ended, first.join("\n"));
    }

    progress("3000 events while the daemon does not look: one overrun, one reading");
    let mark = daemon.log().here();
    daemon.process().signal(Signal::SIGSTOP)?;
    host.run(&format!("uevent-burst {BURST} /sys/bus/usb/devices/usb1"))?;
    let stick = host.plug(UsbDevice::stick("right").port("6"))?;
    host.kernel_name(&stick)?;
    host.run("udevadm settle")?;
    daemon.process().signal(Signal::SIGCONT)?;
    wait_listed(host, "2-6", "with lab")?;
    let lines = daemon.log().all_after(mark, "");
    // What comes behind the decision is the hand-over's own: drivers go, a configuration is set.
    let decided = lines.iter().position(|line| line.contains("decision 2-6 ")).context("no decision")?;
    let readings = lines[..decided].iter().filter(|line| line.contains("sysfs read")).count();
    let overruns = count(daemon.log(), mark, "events were lost");
    progress(&format!("{overruns} overrun, {readings} reading"));
    ensure!(overruns == 1 && readings == 1, "{}", lines.join("\n"));
    Ok(())
}

/// How long the reading took that a log line tells of, in milliseconds.
fn took_ms(line: &str) -> Option<f64> {
    let words = line.split_once("took_us=")?.1;
    Some(words.split_whitespace().next()?.parse::<f64>().ok()? / 1000.0)
}

/// The time at the head of a log line, in milliseconds since midnight.
fn milliseconds(line: &str) -> Option<f64> {
    let time = line.split_whitespace().next()?.split_once('T')?.1.trim_end_matches('Z');
    let mut parts = time.split(':');
    let mut part = || parts.next()?.parse::<f64>().ok();
    Some(((part()? * 60.0 + part()?) * 60.0 + part()?) * 1000.0)
}

#[test]
fn devices_that_change_or_are_needed_stay_where_they_belong() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let _daemon = Usbpolicyd::start(host, POLICY)?;
        let (work, lab) = (instance(host, "work", &[])?, instance(host, "lab", &[])?);
        let wrap = instance(host, "wrap", &[])?;
        let counting = start_counting(host)?;
        changes(host, &work, &lab)?;
        not_authorized(host, &work)?;
        let stick = needed_by_the_host(host, &work)?;
        finish_counting(&counting, &wrap)?;
        // It takes the authorization of all buses.
        beside_usbguard(host, &work)?;
        root_file_system(host, &work, &stick)?;
        for log in [work.log(), lab.log(), wrap.log()] {
            ensure!(count(log, Mark::START, "WRONG DEVICE") == 0, "{}", log.tail(40));
        }
        Ok(())
    })
}

/// Whether a plug-in, counted from 1, is that of the VM's device. There are 126 numbers, no multiple of four: when they have
/// wrapped, each device gets numbers that were the other's.
const fn is_counted(turn: usize) -> bool {
    turn % 4 == 1
}

/// Two devices that take turns in one socket until device numbers have wrapped, one of them a VM's.
fn start_counting(host: &Host) -> Result<Process> {
    plug_gadget(host, "mine", "sourcesink", "super", "")?;
    host.run("gadget unplug mine")?;
    plug_gadget(host, "other", "loopback", "super", "")?;
    host.run("gadget unplug other && gadget plug other --id 0525:a4a5 && gadget unplug other")?;
    let script = format!(
        "cd /sys/kernel/config/usb_gadget; udc=dummy_udc.3; \
         for bus in /sys/devices/platform/dummy_hcd.3/usb*; do \
           [ $(cat $bus/speed) = 5000 ] && bus=$(cat $bus/busnum) && break; done; \
         echo bus $bus; place=/sys/bus/usb/devices/$bus-1; \
         is_taken() {{ [ \"$(basename \"$(readlink $place:1.0/driver)\")\" = usbfs ]; }}; \
         turn() {{ echo $udc > $1/UDC; until [ -e $place/idProduct ]; do busybox usleep 20000; done; \
           [ $1 = other ] || until is_taken; do busybox usleep 20000; done; cat $place/devnum; \
           echo > $1/UDC; while [ -e $place ]; do busybox usleep 10000; done; }}; \
         for i in $(seq {PLUG_INS}); do \
           if [ $((i % 4)) = 1 ]; then turn mine; else turn other; fi; done; echo counted"
    );
    host.spawn(&["bash", "-c", &script])
}

fn finish_counting(counting: &Process, wrap: &Process) -> Result<()> {
    counting.log().wait("counted", Duration::from_secs(400))?;
    let numbers: Vec<u32> =
        counting.log().all_after(Mark::START, "").iter().filter_map(|line| line.parse().ok()).collect();
    ensure!(numbers.len() == PLUG_INS, "{} plug-ins", numbers.len());
    let is_again = |number: &u32| numbers.iter().filter(|other| *other == number).count() > 1;
    ensure!(numbers.iter().any(is_again), "device numbers did not wrap: {numbers:?}");
    let bus = counting.log().wait("bus ", SHORT)?.text;
    let bus: u32 = bus.trim_start_matches("bus ").parse()?;
    let attached = wrap.log().all_after(Mark::START, &format!("attach * {bus:03}:*0525:a4a0 super"));
    let expected = (1..=PLUG_INS).filter(|turn| is_counted(*turn)).count();
    progress(&format!(
        "T11: {PLUG_INS} plug-ins, numbers up to 127 and again; {} hand-overs",
        attached.len()
    ));
    ensure!(attached.len() == expected, "{} hand-overs for {expected} plug-ins", attached.len());
    Ok(())
}

/// Gadgets that are something else when they come again.
fn changes(host: &Host, work: &Process, lab: &Process) -> Result<()> {
    progress("a stick, and the same ids with a keyboard behind them");
    host.run("truncate -s 1M /tmp/disk.img")?;
    let mark = work.log().here();
    plug_gadget(host, "drive", "storage", "high", "--file /tmp/disk.img")?;
    work.log().wait_after(mark, "attach * 1d6b:0104 high ", SHORT)?;
    work.log().wait_after(mark, "holding ", SHORT)?;
    remove_gadget(host, "drive")?;
    work.log().wait_after(mark, "gone ", SHORT)?;
    let mark = work.log().here();
    plug_gadget(host, "bad", "storage --function keyboard", "high", "--file /tmp/disk.img")?;
    wait_until(host, "usbpolicyctl list --json | grep -q 'a stick that types'")?;
    println!("{}", host.run("usbpolicyctl list --long || true")?);
    ensure!(count(work.log(), mark, "attach ") == 0, "a stick that types was handed over");
    remove_gadget(host, "bad")?;

    progress("a phone that comes back as something else on the same socket");
    let mark = lab.log().here();
    plug_gadget(host, "phone", "acm", "high", "")?;
    lab.log().wait_after(mark, "attach * 1d6b:0105 high ", SHORT)?;
    lab.log().wait_after(mark, "holding ", SHORT)?;
    host.run("gadget unplug phone")?;
    lab.log().wait_after(mark, "gone ", SHORT)?;
    host.run("gadget plug phone --id 18d1:4ee7")?;
    lab.log().wait_after(mark, "attach * 18d1:4ee7 high ", SHORT)?;
    lab.log().wait_after(mark, "holding ", SHORT)?;
    remove_gadget(host, "phone")?;
    wait_id(host.remote(), "!18d1:4ee7")
}

/// `authorized_default=0`: nothing is handed over before somebody has authorized it, and what is assigned stays so.
fn not_authorized(host: &Host, work: &Process) -> Result<()> {
    progress("authorized_default=0");
    let mark = work.log().here();
    let earlier = host.plug(UsbDevice::tablet("earlier").port("3"))?;
    work.log().wait_after(mark, "attach * 3 0627:0001 ", SHORT)?;
    work.log().wait_after(mark, "holding ", SHORT)?;
    host.run("for bus in usb1 usb2; do echo 0 > /sys/bus/usb/devices/$bus/authorized_default; done")?;
    let mark = work.log().here();
    let stick = host.plug(UsbDevice::stick("needed").port("2"))?;
    let name = host.kernel_name(&stick)?;
    wait_until(host, "usbpolicyctl list --json | grep -q 'waits for authorization'")?;
    ensure!(count(work.log(), mark, "attach ") == 0, "an unauthorized device was handed over");
    let authorized = std::time::Instant::now();
    host.run(&format!("echo 1 > /sys/bus/usb/devices/{name}/authorized"))?;
    let line = work.log().wait_after(mark, "attach * 2 46f4:0001 ", SHORT)?;
    work.log().wait_after(mark, "holding ", SHORT)?;
    progress(&format!("handed over {:?} after it was authorized", line.at.duration_since(authorized)));
    host.run("for bus in usb1 usb2; do echo 1 > /sys/bus/usb/devices/$bus/authorized_default; done")?;
    ensure!(count(work.log(), mark, "gone ") == 0 && count(work.log(), mark, "detach ") == 0);
    host.unplug(&stick)?;
    host.unplug(&earlier)?;
    work.log().wait_after(mark, "gone ", SHORT)?;
    Ok(())
}

/// What USBGuard allows is handed over, what it blocks waits for it.
fn beside_usbguard(host: &Host, work: &Process) -> Result<()> {
    progress("beside USBGuard");
    let mark = work.log().here();
    // It was drained last, and has the one device that is there again.
    host.run("usbpolicyctl vm resume work")?;
    work.log().wait_after(mark, "holding ", SHORT)?;
    let mark = work.log().here();
    let configuration = "RuleFile=/etc/usbguard/rules.conf\nImplicitPolicyTarget=block\nPresentDevicePolicy=keep\n\
        PresentControllerPolicy=keep\nInsertedDevicePolicy=apply-policy\nAuthorizedDefault=none\n\
        RestoreControllerDeviceState=false\nDeviceManagerBackend=uevent\nIPCAllowedUsers=root\n\
        AuditBackend=FileAudit\nAuditFilePath=/tmp/usbguard-audit.log\n";
    host.remote().write_file("/etc/usbguard/usbguard-daemon.conf", configuration.as_bytes())?;
    host.remote().write_file("/etc/usbguard/rules.conf", b"allow id 46f4:0001\n")?;
    host.run("chmod 600 /etc/usbguard/*.conf")?;
    let usbguard =
        host.spawn(&["usbguard-daemon", "-f", "-k", "-c", "/etc/usbguard/usbguard-daemon.conf"])?;
    wait_until(host, "grep -qx 0 /sys/bus/usb/devices/usb1/authorized_default && usbguard list-rules")?;

    let stick = host.plug(UsbDevice::stick("left").port("5"))?;
    work.log().wait_after(mark, "attach * 5 46f4:0001 ", SHORT)?;
    work.log().wait_after(mark, "holding ", SHORT)?;
    let tablet = host.plug(UsbDevice::tablet("blocked").port("3"))?;
    wait_until(host, "usbguard list-devices --blocked | grep -q 0627:0001")?;
    wait_until(host, "usbpolicyctl list --json | grep -q 'waits for authorization'")?;
    ensure!(count(work.log(), mark, "attach ") == 1, "a blocked device was handed over");
    host.run("usbguard allow-device $(usbguard list-devices --blocked | sed -n 's/: .*id 0627:0001.*//p')")?;
    work.log().wait_after(mark, "attach * 3 0627:0001 ", SHORT)?;

    usbguard.signal(Signal::SIGTERM)?;
    usbguard.wait(SHORT)?;
    for device in [stick, tablet] {
        let mark = work.log().here();
        host.unplug(&device)?;
        work.log().wait_after(mark, "gone ", SHORT)?;
    }
    Ok(())
}

/// A stick that the host works with, by way of a mapping, a loop device or as swap.
fn needed_by_the_host(host: &Host, work: &Process) -> Result<Plugged> {
    progress("a stick that the host needs");
    // Before its rule can see it: the host is at work already.
    host.run("usbpolicyctl vm pause work")?;
    let stick = host.plug(UsbDevice::stick("needed").port("2"))?;
    let name = host.kernel_name(&stick)?;
    wait_until(host, "ls /sys/block/sd* > /dev/null 2>&1")?;
    let disk = host.run("basename $(ls -d /sys/block/sd* | tail -1)")?;
    let encrypt = format!(
        "modprobe -a dm_mod dm_crypt loop; echo \"0 $(blockdev --getsz /dev/{disk}) crypt aes-xts-plain64 \
         $(printf %064d 7) 0 /dev/{disk} 0\" | dmsetup create --uuid CRYPT-LUKS2-0-root root && \
         mkfs.ext4 -q /dev/mapper/root && mkdir -p /srv/root && mount /dev/mapper/root /srv/root"
    );
    let steps: [(&str, &str, &str, &str); 4] = [
        (
            "an encrypted file system",
            &encrypt,
            "mounted on /srv/root",
            "umount /srv/root && dmsetup remove root",
        ),
        ("swap", "mkswap /dev/DISK && swapon /dev/DISK", "swapped to", "swapoff /dev/DISK"),
        (
            "a file system on a loop device",
            "losetup /dev/loop0 /dev/DISK && mkfs.ext4 -q /dev/loop0 && mount /dev/loop0 /srv/root",
            "mounted on /srv/root",
            "umount /srv/root && losetup -d /dev/loop0",
        ),
        (
            "swap in a file on it",
            "mkfs.ext4 -q /dev/DISK && mount /dev/DISK /mnt && dd if=/dev/zero of=/mnt/swap bs=1M count=4 && \
             chmod 600 /mnt/swap && mkswap /mnt/swap && swapon /mnt/swap",
            "swapped to",
            "swapoff /mnt/swap && umount /mnt",
        ),
    ];
    for (what, begin, why, end) in steps {
        let mark = work.log().here();
        host.run(&begin.replace("DISK", &disk)).with_context(|| format!("making {what}"))?;
        wait_until(host, &format!("usbpolicyctl list --json | grep -q '{why}'"))?;
        host.run("usbpolicyctl vm resume work")?;
        wait_listed(host, &name, "protected")?;
        let order = host.remote().try_run(&format!("usbpolicyctl attach {name} lab"), SHORT)?;
        ensure!(order.status == 1 && order.transcript.contains(why), "{}", order.transcript);
        ensure!(count(work.log(), mark, "attach ") == 0, "{what} was taken from the host");
        host.run(&end.replace("DISK", &disk))?;
        work.log().wait_after(mark, "attach * 2 46f4:0001 ", SHORT)?;
        work.log().wait_after(mark, "holding ", SHORT)?;
        progress(&format!("{what}: protected, and free when it is gone"));
        host.run("usbpolicyctl vm drain work")?;
        wait_driver(host, &name, "usb-storage")?;
        wait_until(host, &format!("[ -b /dev/{disk} ]"))?;
    }
    Ok(stick)
}

/// A stick mounted as the root directory. What is mounted there hides nothing from those who run already, and cannot be
/// unmounted: the last step.
fn root_file_system(host: &Host, work: &Process, stick: &Plugged) -> Result<()> {
    progress("the root file system on a stick");
    host.run("usbpolicyctl vm drain work")?;
    let name = host.kernel_name(stick)?;
    wait_driver(host, &name, "usb-storage")?;
    wait_until(host, "ls /sys/block/sd* > /dev/null 2>&1")?;
    let mark = work.log().here();
    host.run("disk=/dev/$(basename $(ls -d /sys/block/sd* | tail -1)); mkfs.ext4 -q $disk && mount $disk /")?;
    wait_until(host, "usbpolicyctl list --json | grep -q 'is mounted on /\\W'")?;
    host.run("usbpolicyctl vm resume work")?;
    wait_listed(host, &name, "protected")?;
    let order = host.remote().try_run(&format!("usbpolicyctl attach {name} lab"), SHORT)?;
    ensure!(order.status == 1 && order.transcript.contains("is mounted on /"), "{}", order.transcript);
    ensure!(count(work.log(), mark, "attach ") == 0, "the root disk was taken from the host");
    Ok(())
}
