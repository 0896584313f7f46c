//! The kernel's own host controller test, `usbtest.ko`: on the host itself, which is the reference, and in a guest.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vm_tests::scenarios::Client;
use vm_tests::usbtest::{Call, Suite};
use vm_tests::virtual_devices::{UsbIpDevice, install, plug_gadget, remove_gadget};
use vm_tests::{Guest, Host, HostConfig, Remote, Usbpolicyd, Usbvfiod, on_each_client, progress, scenario};

/// All calls of a suite, with every processor emulated and busy.
const SUITE_WITHIN: Duration = Duration::from_secs(600);

/// The device goes to vm1.
const POLICY: &str = r#"
schema = 1
[vms.vm1]
[[assign]]
vm = "vm1"
match = { id = "0525:a4a0" }
"#;

/// A device and what of it is tested.
struct Subject {
    suite: Suite,
    speed: &'static str,
    is_gadget: bool,
}

impl Subject {
    fn suite_name(&self) -> &'static str {
        match self.suite {
            Suite::Bulk => "bulk",
            Suite::Isochronous => "isochronous",
            Suite::Interrupt => "interrupt",
        }
    }

    /// The value of `usbtest`'s parameter `alt`.
    fn alternate(&self) -> u8 {
        match self.suite {
            Suite::Bulk => 0,
            Suite::Isochronous => 1,
            Suite::Interrupt => 2,
        }
    }

    fn title(&self) -> String {
        let kind = if self.is_gadget { "SourceSink gadget" } else { "USB/IP device" };
        format!("{} cases, {} speed, {kind}", self.suite_name(), self.speed)
    }

    /// Runs `body` while the device is in.
    fn while_plugged<T>(&self, host: &Host, body: impl FnOnce() -> Result<T>) -> Result<T> {
        // A driver that udev loads by itself would have the wrong parameter, or take what is meant for a guest.
        host.run("mkdir -p /etc/modprobe.d; echo blacklist usbtest > /etc/modprobe.d/usbtest.conf")?;
        if self.is_gadget {
            plug_gadget(host, "zero", "sourcesink", self.speed, "")?;
            let result = body();
            remove_gadget(host, "zero")?;
            return result;
        }
        let device = UsbIpDevice::plug(host, "usbtest", &["--speed", self.speed])?;
        let result = body()?;
        let wrong = device.statistics()?["device"]["model"]["wrong"].clone();
        ensure!(wrong == 0, "{wrong} bytes arrived wrong in the device");
        Ok(result)
    }
}

/// One line of the table.
struct Row {
    call: Call,
    result: String,
    seconds: f64,
}

/// Lets a kernel test the device that is in.
fn run_suite(machine: &Remote, subject: &Subject) -> Result<Vec<Row>> {
    let load = format!("rmmod usbtest 2>/dev/null; modprobe usbtest alt={}", subject.alternate());
    machine.run(&load)?;
    // A second or less; the loop ends with the limit of the command.
    machine
        .run("until ls -d /sys/bus/usb/drivers/usbtest/*:* >/dev/null 2>&1; do busybox usleep 50000; done")?;
    let script = format!("usbtest-run --json --suite {}", subject.suite_name());
    let output = machine.try_run(&script, SUITE_WITHIN)?;
    machine.run("rmmod usbtest")?;
    let rows = output.text().lines().map(parse_row).collect::<Result<Vec<_>>>()?;
    ensure!(rows.len() == subject.suite.calls().len(), "{}", output.transcript);
    Ok(rows)
}

fn parse_row(line: &str) -> Result<Row> {
    let value: serde_json::Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
    let call = serde_json::from_value(value["call"].clone())?;
    let result = value["result"].as_str().context("result")?.to_owned();
    Ok(Row { call, result, seconds: value["seconds"].as_f64().context("seconds")? })
}

/// Both results next to each other, and whether all is well.
fn compare(host: &[Row], guest: &[Row], title: &str) -> Result<()> {
    println!("{title}");
    println!("case  times    bytes   vary  sglen   host          seconds   guest         seconds");
    for (host, guest) in host.iter().zip(guest) {
        let Call { case, iterations, length, vary, sglen } = host.call;
        println!(
            "{case:4} {iterations:6} {length:8} {vary:6} {sglen:6}   {:11} {:9.6}   {:11} {:9.6}",
            host.result, host.seconds, guest.result, guest.seconds
        );
    }
    let failed =
        |rows: &[Row]| rows.iter().filter(|row| row.result != "ok").map(|row| row.call).collect::<Vec<_>>();
    // Without us in between: if this fails, a failure in a guest says nothing.
    ensure!(failed(host).is_empty(), "{title}: these failed on the host itself: {:?}", failed(host));
    ensure!(failed(guest).is_empty(), "{title}: these failed in the guest: {:?}", failed(guest));
    Ok(())
}

/// The same device with the same calls, first on the host itself and then in a guest.
fn on_host_and_in_guest(client: Client, subject: &Subject) -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let of_host = subject.while_plugged(host, || run_suite(host.remote(), subject))?;
        progress("the host is through");
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &client.guest("vm1"))?;
        install(&guest, "usbtest-run")?;
        let of_guest = subject.while_plugged(host, || run_suite(guest.remote(), subject))?;
        compare(&of_host, &of_guest, &subject.title())?;
        controller.stop()
    })
}

on_each_client!(
    bulk_at_high_speed,
    bulk_at_superspeed,
    isochronous_at_high_speed,
    isochronous_at_superspeed,
    interrupt_at_high_speed,
    interrupt_at_superspeed,
);

fn bulk_at_high_speed(client: Client) -> Result<()> {
    on_host_and_in_guest(client, &Subject { suite: Suite::Bulk, speed: "high", is_gadget: true })
}

fn bulk_at_superspeed(client: Client) -> Result<()> {
    on_host_and_in_guest(client, &Subject { suite: Suite::Bulk, speed: "super", is_gadget: true })
}

fn isochronous_at_high_speed(client: Client) -> Result<()> {
    on_host_and_in_guest(client, &Subject { suite: Suite::Isochronous, speed: "high", is_gadget: false })
}

fn isochronous_at_superspeed(client: Client) -> Result<()> {
    on_host_and_in_guest(client, &Subject { suite: Suite::Isochronous, speed: "super", is_gadget: false })
}

fn interrupt_at_high_speed(client: Client) -> Result<()> {
    on_host_and_in_guest(client, &Subject { suite: Suite::Interrupt, speed: "high", is_gadget: false })
}

fn interrupt_at_superspeed(client: Client) -> Result<()> {
    on_host_and_in_guest(client, &Subject { suite: Suite::Interrupt, speed: "super", is_gadget: false })
}
