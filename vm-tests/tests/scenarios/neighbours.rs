//! Devices that lie, break, fall silent or hang, in front of a guest with a neighbour that works: usbvfiod lives, and the
//! neighbour goes on.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vm_tests::neighbours::{HANG, Report};
use vm_tests::scenarios::Client;
use vm_tests::virtual_devices::{UsbIpDevice, install, is_present, wait_id};
use vm_tests::{Guest, Host, HostConfig, Usbpolicyd, Usbvfiod, on_each_client, progress, scenario};

/// All devices of the harness go to vm1: 0001 is the neighbour, 0666 the one that misbehaves, 0667 what it turns into.
const POLICY: &str = r#"
schema = 1
[vms.vm1]
[[assign]]
vm = "vm1"
match = { id = "1209:*" }
"#;

const NEIGHBOUR: &str = "1209:0001";
const HOSTILE: &str = "1209:0666";
const OTHER: &str = "1209:0667";

/// A register of the controller. debugfs reads it each time (xhci-debugfs.c xhci_portsc_show).
const PORTSC: &str = "$(ls -d /sys/kernel/debug/usb/xhci/*/ports/port01/portsc)";

/// The guest is told after at least so long that its SET_INTERFACE failed.
const HANG_SEEN_SECONDS: f64 = 3.0;
/// Something short in a guest on a busy machine; device requests that fail take 5 s each.
const STEP_WITHIN: Duration = Duration::from_secs(120);

on_each_client!(hostile_devices_hurt_no_neighbour);

fn hostile_devices_hurt_no_neighbour(client: Client) -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &client.guest("vm1"))?;
        install(&guest, "usb-stream")?;
        let neighbour = UsbIpDevice::plug(host, "bulk", &["--speed", "super"])?;
        wait_id(guest.remote(), NEIGHBOUR)?;
        let goes_on = |after: &str| -> Result<()> {
            ensure!(controller.process().is_running(), "usbvfiod ended after {after}");
            let report = stream(&guest, "bulk-in --size 16384 --transfers 20 --seconds 60")?;
            ensure!(
                report["transfers"].as_u64() >= Some(20) && report["wrong"] == 0,
                "after {after}: {report}"
            );
            Ok(())
        };
        goes_on("its plug")?;

        hang_in_set_interface(host, &guest, &neighbour)?;

        // Each is a device for the host's kernel, or none; for the guest it is what the host's kernel makes of it.
        let lies = [
            "total-length-huge",
            "total-length-small",
            "length-zero",
            "length-one",
            "length-beyond-end",
            "interfaces-255",
            "endpoints",
        ];
        let mut liars = Vec::new();
        for name in lies {
            liars.push(UsbIpDevice::plug(host, name, &["--serial", name])?);
        }
        liars.push(UsbIpDevice::plug(host, "superspeed-lies", &["--speed", "super"])?);
        liars.push(UsbIpDevice::plug(host, "missing-configurations", &["--speed", "super"])?);
        wait_id(guest.remote(), HOSTILE)?;
        goes_on("nine devices with lying descriptors")?;
        let count =
            guest.run(&format!("cat /sys/bus/usb/devices/*/idProduct | grep -cx {}", &HOSTILE[5..]))?;
        progress(&format!("{count} of {} liars reached the guest", liars.len()));
        drop(liars);
        gone(&guest, HOSTILE)?;
        goes_on("their pull")?;

        for name in ["babble", "broken", "stall", "silence"] {
            let device = UsbIpDevice::plug(host, name, &[])?;
            wait_id(guest.remote(), HOSTILE)?;
            for action in ["bulk-in", "bulk-out"] {
                // How it fails is the guest's business; that it ends is ours.
                let command =
                    format!("timeout 5 usb-stream --id {HOSTILE} {action} --transfers 50 --seconds 1 2>&1");
                let output = guest.remote().try_run(&command, STEP_WITHIN)?;
                progress(&format!("{name}, {action}: {}", output.text().trim()));
            }
            goes_on(name)?;
            drop(device);
            gone(&guest, HOSTILE)?;
        }

        let turncoat = UsbIpDevice::plug(host, "identity", &[])?;
        wait_id(guest.remote(), HOSTILE)?;
        // A transfer first, so that the reset is a real one.
        stream_of(&guest, HOSTILE, "bulk-in --transfers 4")?;
        turncoat.order("new-identity")?;
        let reset = guest.remote().try_run(&format!("usb-stream --id {HOSTILE} reset 2>&1"), STEP_WITHIN)?;
        progress(&format!("reset into another device: {}", reset.text().trim()));
        wait_id(guest.remote(), OTHER)?;
        gone(&guest, HOSTILE)?;
        goes_on("a device that came back as another one")?;
        drop(turncoat);
        gone(&guest, OTHER)?;

        // The guest cannot enumerate these two; the last one makes it wait for each of its requests.
        for name in ["stall-control", "silence-control"] {
            let device = UsbIpDevice::plug(host, name, &[])?;
            device.kernel_name()?;
            goes_on(name)?;
        }
        controller.stop()
    })
}

/// SET_INTERFACE of one device takes 5 s; meanwhile: the neighbour's throughput, and how long a register read takes.
fn hang_in_set_interface(host: &Host, guest: &Guest, neighbour: &UsbIpDevice) -> Result<()> {
    let hang = HANG.as_millis().to_string();
    let slow = UsbIpDevice::plug(host, "identity", &["--delay-set-interface", &hang])?;
    wait_id(guest.remote(), HOSTILE)?;
    let report: Report =
        serde_json::from_value(stream(guest, &format!("beside-hang {HOSTILE} --register {PORTSC}"))?)?;
    let (throughput, register_read) = report.changes();
    progress(&format!("throughput {throughput:+.1} %, register read {register_read:+.1} %: {report:?}"));
    ensure!(report.wrong == 0 && report.beside.reads > 0, "{report:?}");
    // Else it did not hang, and nothing is shown.
    ensure!(report.hangs.iter().all(|seconds| *seconds > HANG_SEEN_SECONDS), "{report:?}");
    // The percentages are for a person (`make bench`): a busy machine changes them more than a neighbour may. A loop that
    // waited with the device that hangs would move next to nothing, and answer one read after seconds.
    ensure!(report.beside.rate() * 3.0 > report.alone.rate(), "{report:?}");
    ensure!(report.beside.worst_us < 2e6, "{report:?}");
    let seen = neighbour.statistics()?;
    progress(&format!("neighbour: {seen}"));
    drop(slow);
    gone(guest, HOSTILE)
}

fn stream(guest: &Guest, action: &str) -> Result<Value> {
    stream_of(guest, NEIGHBOUR, action)
}

fn stream_of(guest: &Guest, id: &str, action: &str) -> Result<Value> {
    let output = guest.run_within(&format!("usb-stream --id {id} {action}"), STEP_WITHIN)?;
    Ok(serde_json::from_str(&output)?)
}

/// Waits until the guest has none of these any more.
fn gone(guest: &Guest, id: &str) -> Result<()> {
    let script = format!("until ! {{ {}; }}; do busybox usleep 50000; done", is_present(id));
    guest.run_within(&script, STEP_WITHIN).map(drop).with_context(|| format!("{id} stays in the guest"))
}
