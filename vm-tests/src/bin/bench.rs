//! `make bench`: the same stick read by the host itself, through QEMU's `usb-host`, and through us, in one run.
//!
//! Machines differ and are noisy, so ratios count, not figures; everything here happens in one virtual host, one after
//! the other, and each figure is the median of [`RUNS`].

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use vm_tests::scenarios::Client;
use vm_tests::{
    Guest, GuestConfig, Host, HostConfig, Plugged, UsbDevice, Usbpolicyd, Usbvfiod, Vmm, progress, slots,
};

/// Counted runs of each measurement.
const RUNS: usize = 3;
/// Length of one.
const SECONDS: u64 = 4;
const POLICY: &str = r#"
schema = 1
[vms.vm1]
[[assign]]
vm = "vm1"
match = { id = "46f4:0001" }
"#;

/// What one way to the stick achieves.
struct Row {
    name: &'static str,
    sequential_mb: f64,
    random_reads: f64,
    /// CPU seconds of the USB process for each GB of the sequential runs.
    cpu_per_gb: Option<f64>,
}

fn main() -> Result<()> {
    let _slot = slots::Slot::acquire()?;
    let host = Host::boot(&HostConfig::default())?;
    let rows = measure(&host).inspect_err(|_| eprintln!("{}", host.report()))?;
    print(&rows);
    Ok(())
}

fn measure(host: &Host) -> Result<Vec<Row>> {
    let stick = host.plug(UsbDevice::stick("bench").size_mib(128))?;
    let name = host.kernel_name(&stick)?;
    let mut rows = Vec::new();

    let disk = host.run(&format!(
        "until ls /sys/bus/usb/devices/{name}/*/host*/target*/*/block 2>/dev/null; do sleep 0.1; done"
    ))?;
    let disk = format!("/dev/{}", disk.trim());
    progress("the host itself");
    let on_host = |mode: &str| {
        run(
            || host.remote().run_within(&format!("/stage/bin/disk-speed {disk} {mode} {SECONDS}"), WITHIN),
            mode,
        )
    };
    rows.push(Row {
        name: "host",
        sequential_mb: on_host("sequential")?.0,
        random_reads: on_host("random")?.0,
        cpu_per_gb: None,
    });

    let (bus, port) = name.split_once('-').context("a port name")?;
    let vmm = Vmm::QemuUsbHost { devices: vec![format!("hostbus={bus},hostport={port}")] };
    let guest = Guest::start(host, &GuestConfig::new("peer", vmm))?;
    rows.push(in_guest(host, &guest, &stick, "QEMU usb-host", None)?);
    guest.stop()?;

    let _policy = Usbpolicyd::start(host, POLICY)?;
    for (client, label) in [(Client::Qemu, "ours, QEMU"), (Client::CloudHypervisor, "ours, Cloud Hypervisor")]
    {
        if client.is_available() {
            let controller = Usbvfiod::start(host, "vm1")?;
            let guest = Guest::start(host, &client.guest("vm1"))?;
            rows.push(in_guest(host, &guest, &stick, label, Some("usbvfiod"))?);
            guest.stop()?;
            controller.stop()?;
        }
    }
    Ok(rows)
}

/// Longest that one measurement may take.
const WITHIN: Duration = Duration::from_secs(120);

fn in_guest(
    host: &Host,
    guest: &Guest,
    stick: &Plugged,
    name: &'static str,
    process: Option<&str>,
) -> Result<Row> {
    progress(name);
    let disk = guest.wait_disk(stick)?;
    let program = std::fs::read(vm_tests::binaries::directory()?.join("disk-speed"))?;
    guest.remote().write_file("/bin/disk-speed", &program)?;
    guest.run("chmod +x /bin/disk-speed")?;
    let measure = |mode: &str| {
        run(|| guest.run_within(&format!("/bin/disk-speed {disk} {mode} {SECONDS}"), WITHIN), mode)
    };
    let before = cpu_seconds(host, process)?;
    let (sequential_mb, megabytes) = measure("sequential")?;
    let after = cpu_seconds(host, process)?;
    let cpu = before.zip(after).map(|(before, after)| (after - before) / (megabytes / 1e3));
    Ok(Row { name, sequential_mb, random_reads: measure("random")?.0, cpu_per_gb: cpu })
}

/// Median rate of [`RUNS`] runs (MB/s or reads/s, by `mode`), and the megabytes that all of them read.
fn run(mut once: impl FnMut() -> Result<String>, mode: &str) -> Result<(f64, f64)> {
    let mut rates = Vec::new();
    let mut megabytes = 0.0;
    for _ in 0..RUNS {
        let text = once()?;
        let said: Value =
            serde_json::from_str(text.trim()).with_context(|| format!("disk-speed said {text}"))?;
        let field = |name: &str| said[name].as_f64().with_context(|| format!("no {name} in {text}"));
        rates.push(field(if mode == "random" { "reads_per_s" } else { "mb_per_s" })?);
        megabytes += field("mb_per_s")? * field("seconds")?;
    }
    rates.sort_by(f64::total_cmp);
    Ok((rates[rates.len() / 2], megabytes))
}

/// CPU time so far of the process with this name in the host.
fn cpu_seconds(host: &Host, process: Option<&str>) -> Result<Option<f64>> {
    let Some(process) = process else { return Ok(None) };
    let ticks = host.run(&format!("cut -d' ' -f14,15 /proc/$(pidof -s {process})/stat"))?;
    let sum: f64 = ticks.split_whitespace().filter_map(|tick| tick.parse::<f64>().ok()).sum();
    // USER_HZ is 100 on every Linux that we run on.
    Ok(Some(sum / 100.0))
}

fn print(rows: &[Row]) {
    let peer = rows.iter().find(|row| row.name == "QEMU usb-host");
    let ratio = |value: f64, of: Option<f64>| match of {
        Some(of) if of > 0.0 => format!("{:.2}", value / of),
        _ => "-".to_owned(),
    };
    println!(
        "\nstick, SuperSpeed, bulk-only; median of {RUNS} runs of {SECONDS} s; × is against QEMU usb-host\n"
    );
    println!(
        "{:<24} {:>12} {:>6} {:>14} {:>6} {:>10}",
        "", "1 MiB, MB/s", "×", "4 KiB, reads/s", "×", "CPU s/GB"
    );
    for row in rows {
        println!(
            "{:<24} {:>12.1} {:>6} {:>14.0} {:>6} {:>10}",
            row.name,
            row.sequential_mb,
            ratio(row.sequential_mb, peer.map(|peer| peer.sequential_mb)),
            row.random_reads,
            ratio(row.random_reads, peer.map(|peer| peer.random_reads)),
            row.cpu_per_gb.map_or("-".to_owned(), |cpu| format!("{cpu:.2}")),
        );
    }
}
