//! Numbered isochronous packets through a guest, both ways: none lost, none doubled, none changed.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use vm_tests::scenarios::Client;
use vm_tests::virtual_devices::{UsbIpDevice, install, wait_id};
use vm_tests::{Guest, HostConfig, Usbpolicyd, Usbvfiod, on_each_client, progress, scenario};

/// The source and sink goes to vm1.
const POLICY: &str = r#"
schema = 1
[vms.vm1]
[[assign]]
vm = "vm1"
match = { id = "1209:0002" }
"#;

/// Some seconds of stream, and the start and end of it on a busy machine.
const STREAM_WITHIN: Duration = Duration::from_secs(120);

/// Of 4000 on an idle machine; more than is ever in flight.
const PACKETS_MIN: u64 = 200;

on_each_client!(high_speed_packets_are_numbered, superspeed_packets_are_numbered);

fn high_speed_packets_are_numbered(client: Client) -> Result<()> {
    packets_are_numbered(client, "high")
}

fn superspeed_packets_are_numbered(client: Client) -> Result<()> {
    packets_are_numbered(client, "super")
}

fn packets_are_numbered(client: Client, speed: &str) -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let _policy = Usbpolicyd::start(host, POLICY)?;
        let controller = Usbvfiod::start(host, "vm1")?;
        let guest = Guest::start(host, &client.guest("vm1"))?;
        install(&guest, "usb-stream")?;
        let device = UsbIpDevice::plug(host, "isochronous", &["--speed", speed])?;
        wait_id(guest.remote(), "1209:0002")?;

        let report = stream(&guest, "isochronous-in")?;
        progress(&format!("in: {report}"));
        let check = &report["check"];
        for fault in ["missing", "disordered", "corrupt", "empty"] {
            ensure!(check[fault] == 0, "{fault}: {report}");
        }
        ensure!(report["failed_packets"] == 0, "{report}");
        ensure!(check["received"].as_u64() >= Some(PACKETS_MIN), "too few packets: {report}");
        progress(&format!("device: {}", device.statistics()?));

        let report = stream(&guest, "isochronous-out")?;
        progress(&format!("out: {report}"));
        let seen = device.statistics()?;
        progress(&format!("device: {seen}"));
        let sink = &seen["device"]["model"]["sink"];
        for fault in ["missing", "disordered", "corrupt", "empty"] {
            ensure!(sink[fault] == 0, "{fault}: {seen}");
        }
        ensure!(sink["received"] == report["sent_packets"], "not all has arrived: {report}, {seen}");
        ensure!(sink["received"].as_u64() >= Some(PACKETS_MIN), "too few packets: {report}");
        controller.stop()
    })
}

fn stream(guest: &Guest, action: &str) -> Result<Value> {
    let command = format!("usb-stream --id 1209:0002 {action} --size 192 --packets 16 --ahead 8 --seconds 4");
    Ok(serde_json::from_str(&guest.run_within(&command, STREAM_WITHIN)?)?)
}
